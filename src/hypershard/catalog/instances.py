"""Instances of AWS: what each has inside and what an hour of it costs. Dated, sourced rows in instances.json."""

from __future__ import annotations

import datetime
import difflib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..log import logger
from .gpus import Gpu, gpus

SERVICES = ("ec2", "sagemaker")
_STALE_DAYS = 120  # prices of whole families fell by 44 % overnight in June 2025


@dataclass(frozen=True, kw_only=True)
class Price:
    """Dollars for an hour of one instance, on demand.

    `kind`: "listed" by AWS, "second-hand" (a copy of AWS's list), "estimate", or "given" by the user. `region` and
    `date` (of the list, year-month-day) are None where the source does not say.
    """

    dollars_per_hour: float
    kind: str
    region: str | None
    date: str | None
    source: str

    def __str__(self) -> str:
        about = ", ".join(part for part in (self.kind, self.region, self.date) if part)
        return f"${self.dollars_per_hour:,.2f}/h ({about})"


@dataclass(frozen=True, kw_only=True)
class SpotBand:
    """Between what dollars an hour the spot price was seen, where and when; what it will be, nobody knows."""

    low: float
    high: float
    region: str
    date: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Interconnect:
    """What joins the GPUs of one node. `gb_per_second` is per GPU and direction, in 10^9 bytes."""

    kind: str
    gb_per_second: float
    source: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One instance type, named as EC2 does: p5.48xlarge.

    `gpu_memory_mib` is of one GPU, as EC2 reports it. `network_gbit_per_second` is what the node sustains, over EFA
    where there is EFA. `gpudirect_rdma`: EFA reads and writes GPU memory without a copy in the host. `interconnect`
    None: one GPU, or PCIe alone. `ec2` and `sagemaker` are the catalog's prices; ask `price` for the one to use.
    """

    name: str
    gpu: Gpu
    num_gpus: int
    gpu_memory_mib: int
    num_vcpus: int
    ram_gib: int
    nvme_gb: int
    efa_interfaces: int
    network_gbit_per_second: float
    gpudirect_rdma: bool
    interconnect: Interconnect | None
    ec2: Price | None
    sagemaker: Price | None

    @property
    def family(self) -> str:
        return self.name.partition(".")[0]

    @property
    def sagemaker_name(self) -> str:
        return f"ml.{self.name}"

    @property
    def num_cores(self) -> int:
        """Physical cores: every type here runs two threads on each."""
        return self.num_vcpus // 2


@functools.cache
def _catalog() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(__file__).parent / "instances.json").read_text())
    return content


@functools.cache
def instances() -> tuple[Instance, ...]:
    """Every row of the catalog."""
    by_name = {gpu.name: gpu for gpu in gpus()}
    links = {
        kind: Interconnect(kind=kind, **facts)  # one per generation: every type that has it has all of it
        for kind, facts in _catalog()["interconnects"].items()
    }
    return tuple(
        Instance(
            **{
                **row,
                "gpu": by_name[row["gpu"]],
                "interconnect": None if row["interconnect"] is None else links[row["interconnect"]],
                **{service: _listed(row[service]) for service in SERVICES},
            }
        )
        for row in _catalog()["instances"]
    )


def _listed(cell: tuple[float, str] | None) -> Price | None:
    if cell is None:
        return None
    dollars, where = cell
    return Price(dollars_per_hour=dollars, **_catalog()["prices"][where])


def families() -> dict[str, str]:
    """Family word -> the type it means, which is the family's largest: `p5 -> p5.48xlarge`."""
    return dict(_catalog()["families"])


def instance(name: str, *, flag: str = "--instance") -> Instance:
    """The instance called `name`: `p5.48xlarge`, `ml.p5.48xlarge`, or a family's word, `p5`.

    Raises ConfigError naming `flag`, with the reason for a type that is refused, else with the nearest names.
    """
    plain = name.removeprefix("ml.")
    wanted = families().get(plain, plain)
    for row in instances():
        if row.name == wanted:
            return row
    reason = _catalog()["refused_families"].get(plain.partition(".")[0])
    if reason is not None:
        raise ConfigError(f"{flag}={name}: refused: {reason}; take one of the families {', '.join(families())}")
    near = difflib.get_close_matches(plain, [*families(), *(row.name for row in instances())], n=3, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known families are {', '.join(families())}"
    raise ConfigError(f"{flag}={name}: the catalog has no instance type of this name; {hint}")


def price(of: Instance, service: str, *, prices_file: Path | None) -> Price | None:
    """Dollars per hour of one instance from `service` ("ec2" or "sagemaker"), on demand; None: unknown, never 0.

    `prices_file` (YAML or JSON, `{instance: {ec2: 1.23, sagemaker: 4.5}}`) goes before the catalog. A price of the
    catalog that is undated or old is warned of, once. Raises ConfigError for a damaged file.
    """
    assert service in SERVICES
    given = {} if prices_file is None else read_prices(prices_file)
    if (of.name, service) in given:
        dollars = given[of.name, service]
        return (
            None
            if dollars is None
            else Price(
                dollars_per_hour=dollars, kind="given", region=None, date=None, source=f"--prices_file={prices_file}"
            )
        )
    found: Price | None = getattr(of, service)
    if found is not None:
        _warn_of_age(found.date, found.kind, service, datetime.date.today())
    return found


@functools.cache
def _warn_of_age(date: str | None, kind: str, service: str, today: datetime.date) -> None:
    """Cached, so that a table of many prices warns once for each list they come from."""
    advice = "check them, or give your own in --prices_file"
    if date is None:
        logger.warning(f"{service} prices ({kind}) are undated: {advice}")
    elif (today - datetime.date.fromisoformat(date)).days > _STALE_DAYS:
        logger.warning(f"{service} prices ({kind}) are of {date}: {advice}")


def spot_seen(of: Instance) -> SpotBand | None:
    """The band of EC2's spot prices of this type; None: none was looked up."""
    found = _catalog()["spot_seen"].get(of.name)
    return None if found is None else SpotBand(**found)


def read_prices(path: Path) -> dict[tuple[str, str], float | None]:
    """(instance, service) -> dollars per hour, from a user's own file. Raises ConfigError naming the entry."""
    where = f"--prices_file={path}"
    prices = {}
    for name, entries in _mapping(_parsed(path, where), where).items():
        row = instance(str(name), flag=f"{where}: instance")
        for service, dollars in _mapping(entries, f"{where}: {name}").items():
            if service not in SERVICES:
                raise ConfigError(f"{where}: {name}: found {service!r}, expected one of {', '.join(SERVICES)}")
            prices[row.name, service] = _dollars(dollars, f"{where}: {name}: {service}")
    return prices


def _parsed(path: Path, where: str) -> Any:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    import yaml

    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: neither YAML nor JSON: {' '.join(str(error).split())}") from None


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: found {value!r}, expected {{instance: {{ec2: 1.23, sagemaker: 4.5}}}}")
    return value


def _dollars(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{where}: found {value!r}, expected dollars per hour, above 0; null where it is unknown")
    return float(value)
