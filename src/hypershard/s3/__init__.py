"""S3 as the rest of the program needs it: every request ends, every refusal is readable, every upload is checked."""

from .client import S3 as S3
from .refusals import AlreadyExists as AlreadyExists
from .requests import Limits as Limits
from .upload import Upload as Upload
from .uri import Deadline as Deadline
from .uri import S3Uri as S3Uri
