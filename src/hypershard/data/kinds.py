"""What the rows of a data set are; `--data_kind` and meta.json name it so."""

from __future__ import annotations

TEXT = "text"
CHAT = "chat"
PREFERENCE = "preference"
KINDS = (TEXT, CHAT, PREFERENCE)
