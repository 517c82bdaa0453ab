"""The catalog's instances, held against what AWS's own interfaces say of them."""

import datetime
import gzip
import json
import logging
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from hypershard.catalog import instances as module
from hypershard.catalog.instances import Instance, Price, families, instance, instances, price, read_prices, spot_seen
from hypershard.errors import ConfigError

EXPECTED_FAMILIES = ["p4d", "p4de", "p5", "p5e", "p5en", "p6-b200", "p6-b300", "g5", "g6", "g6e"]


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    """EC2's DescribeInstanceTypes, as moto keeps it."""
    pytest.importorskip("moto")
    file = resources.files("moto") / "ec2" / "resources" / "instance_types.json.gz"
    kept: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return kept


@pytest.fixture(scope="module")
def sagemaker_enums() -> dict[str, set[str]]:
    """The instance types that SageMaker's training jobs and HyperPod clusters take."""
    from botocore.loaders import Loader

    shapes = Loader().load_service_model("sagemaker", "service-2")["shapes"]
    return {kind: set(shapes[kind]["enum"]) for kind in ("TrainingInstanceType", "ClusterInstanceType")}


@pytest.fixture(autouse=True)
def _every_test_is_warned_anew() -> Iterator[None]:
    module._warn_of_age.cache_clear()
    yield


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("hypershard"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="hypershard")
    return caplog


def test_every_size_of_every_family_has_one_row(sagemaker_enums: dict[str, set[str]]) -> None:
    """Neither a forgotten size nor one that SageMaker does not have, in jobs or on HyperPod."""
    names = [row.sagemaker_name for row in instances()]
    assert len(names) == len(set(names)) == 32
    for enum in sagemaker_enums.values():
        of_our_families = {name for name in enum if name.split(".")[1] in EXPECTED_FAMILIES}
        assert of_our_families == set(names)


def sustained_gbit_per_second(network: dict[str, Any]) -> float:
    """Of the whole node: "4x 100 Gigabit" is 400; "Up to 10 Gigabit" is what its one card sustains."""
    words = re.fullmatch(r"(?:(\d+)x )?(\d+) Gigabit", network["NetworkPerformance"])
    if words is not None:
        return int(words[1] or 1) * int(words[2])
    (card,) = network["NetworkCards"]
    assert network["NetworkPerformance"].startswith("Up to ")
    return float(card["BaselineBandwidthInGbps"])


@pytest.mark.parametrize("row", instances(), ids=lambda row: row.name)
def test_rows_are_what_ec2_describes(row: Instance, described: dict[str, Any]) -> None:
    facts = described[row.name]
    (gpu,) = facts["GpuInfo"]["Gpus"]
    assert row.gpu.name.startswith(gpu["Name"])
    assert row.num_gpus == gpu["Count"]
    assert row.gpu_memory_mib == gpu["MemoryInfo"]["SizeInMiB"]
    assert row.num_vcpus == facts["VCpuInfo"]["DefaultVCpus"]
    assert row.num_cores == facts["VCpuInfo"]["DefaultCores"]
    assert row.ram_gib * 1024 == facts["MemoryInfo"]["SizeInMiB"]
    assert row.nvme_gb == facts["InstanceStorageInfo"]["TotalSizeInGB"]
    efa = facts["NetworkInfo"].get("EfaInfo", {}).get("MaximumEfaInterfaces", 0)
    assert row.efa_interfaces == efa
    assert facts["NetworkInfo"]["EfaSupported"] == (efa > 0)
    assert row.network_gbit_per_second == sustained_gbit_per_second(facts["NetworkInfo"])
    assert facts["ProcessorInfo"]["SupportedArchitectures"] == ["x86_64"]


@pytest.mark.parametrize("row", instances(), ids=lambda row: row.name)
def test_rows_agree_with_themselves(row: Instance) -> None:
    # The nominal size is in GPUs' gpus.json; a process gets 1 to 7 % less.
    assert 0.92 * row.gpu.memory_gib < row.gpu_memory_mib / 1024 <= row.gpu.memory_gib
    assert (row.interconnect is not None) == (row.family.startswith("p") and row.num_gpus > 1)
    assert not row.gpudirect_rdma or row.efa_interfaces > 0
    for listed in (row.ec2, row.sagemaker):
        if listed is not None:
            assert listed.dollars_per_hour > 0
            assert listed.kind in {"listed", "second-hand", "estimate"}
            assert listed.source
            assert listed.date is None or datetime.date.fromisoformat(listed.date)
    if row.ec2 and row.sagemaker:  # SageMaker adds 15 to 40 %, in every list that was ever seen
        assert 1.14 < row.sagemaker.dollars_per_hour / row.ec2.dollars_per_hour < 1.41


def test_links_are_per_gpu_and_direction() -> None:
    """A data sheet's figure adds both directions up; written down as it is, it would double every prediction."""
    links = {row.family: row.interconnect for row in instances() if row.interconnect}
    found = {family: (link.kind, link.gb_per_second) for family, link in links.items()}
    assert found == {
        "p4d": ("NVLink 3", 300),
        "p4de": ("NVLink 3", 300),
        "p5": ("NVLink 4", 450),
        "p5e": ("NVLink 4", 450),
        "p5en": ("NVLink 4", 450),
        "p6-b200": ("NVLink 5", 900),
        "p6-b300": ("NVLink 5", 900),
    }
    for link in links.values():
        assert link.source
        assert re.fullmatch(r"20\d\d-\d\d", link.date)


def test_a_family_means_its_largest_size() -> None:
    assert sorted(families()) == sorted(EXPECTED_FAMILIES)
    for family, name in families().items():
        row = instance(family)
        sizes = [other for other in instances() if other.family == family]
        assert row.name == name
        assert row.num_gpus == max(other.num_gpus for other in sizes) == 8


@pytest.mark.parametrize("name", ["p5.48xlarge", "ml.p5.48xlarge", "p5", "ml.p5"])
def test_one_instance_by_each_of_its_names(name: str) -> None:
    row = instance(name)
    assert (row.name, row.sagemaker_name, row.family) == ("p5.48xlarge", "ml.p5.48xlarge", "p5")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("p5.47xlarge", "did you mean p5.48xlarge"),
        ("ml.p4d.24xlrage", "did you mean p4d.24xlarge"),
        ("h100", "known families are p4d, p4de, p5"),
        ("", "known families are"),
        ("m5.large", "the catalog has no instance type"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--instance={name}: ")) as caught:
        instance(name)
    assert part in str(caught.value).replace("p5.4xlarge or ", "")


def test_what_cannot_train_is_refused_with_its_reason(sagemaker_enums: dict[str, set[str]]) -> None:
    reasons = {
        "p2": "bfloat16", "p3": "bfloat16", "p3dn": "bfloat16", "g4dn": "bfloat16", "p6e-gb200": "arm64",
        "trn1": "Neuron", "trn1n": "Neuron", "trn2": "Neuron",
    }  # fmt: skip
    refused = {
        name
        for name in set.union(*sagemaker_enums.values())
        if re.match(r"ml\.(p\d|g\dd|trn)", name) and name.split(".")[1] not in EXPECTED_FAMILIES
    }
    assert len(refused) > 15
    for name in [*refused, *reasons]:
        family = name.removeprefix("ml.").split(".")[0]
        with pytest.raises(ConfigError, match=f"refused: .*{reasons[family]}"):
            instance(name)


def test_the_flag_that_was_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match="--family=p3: refused"):
        instance("p3", flag="--family")


def test_an_unknown_price_is_unknown_and_never_nothing() -> None:
    row = instance("p5e")
    for service in ("ec2", "sagemaker"):
        assert price(row, service, prices_file=None) is None


def test_a_price_says_what_it_is_worth() -> None:
    found = price(instance("p5"), "ec2", prices_file=None)
    assert found is not None
    assert (found.dollars_per_hour, found.kind, found.region) == (55.04, "listed", "us-east-1")
    assert str(found) == f"$55.04/h (listed, us-east-1, {found.date})"


def test_old_and_undated_prices_are_warned_of_once_with_their_date(warnings: pytest.LogCaptureFixture) -> None:
    today = datetime.date(2026, 11, 1)
    for date, said in [("2026-07-05", None), ("2026-07-03", "of 2026-07-03"), (None, "undated")]:
        warnings.clear()
        for _ in range(2):
            module._warn_of_age(date, "listed", "ec2", today)
        assert [said in record.getMessage() for record in warnings.records] == ([] if said is None else [True])


def test_the_catalogs_own_prices_go_through_that_check(warnings: pytest.LogCaptureFixture) -> None:
    undated = [row for row in instances() if row.sagemaker and row.sagemaker.date is None]
    assert len(undated) > 1
    for row in undated[:2]:
        price(row, "sagemaker", prices_file=None)
    assert [record.getMessage().split(":")[0] for record in warnings.records] == [
        "sagemaker prices (second-hand) are undated"
    ]


def test_a_users_prices_go_first_without_a_warning(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("p5.48xlarge:\n  ec2: 39.5\n  sagemaker: null\nml.p5e.48xlarge: {sagemaker: 50}\n")
    given = price(instance("p5"), "ec2", prices_file=file)
    assert given == Price(dollars_per_hour=39.5, kind="given", region=None, date=None, source=f"--prices_file={file}")
    assert str(given) == "$39.50/h (given)"
    assert price(instance("p5"), "sagemaker", prices_file=file) is None  # the user says that nobody knows
    found = price(instance("p5e"), "sagemaker", prices_file=file)
    assert found is not None
    assert found.dollars_per_hour == 50
    assert not warnings.records
    listed = price(instance("p4d"), "ec2", prices_file=file)
    assert listed == instance("p4d").ec2


def test_json_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    file.write_text('{\n\t"p4d.24xlarge": {"ec2": 20}}')
    assert read_prices(file) == {("p4d.24xlarge", "ec2"): 20.0}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("p5.49xlarge: {ec2: 1}", "instance=p5.49xlarge: the catalog has no instance type"),
        ("p5.48xlarge: {ec3: 1}", "p5.48xlarge: found 'ec3', expected one of ec2, sagemaker"),
        ("p5.48xlarge: {ec2: 0}", "p5.48xlarge: ec2: found 0, expected dollars per hour"),
        ("p5.48xlarge: {ec2: -3}", "found -3"),
        ("p5.48xlarge: {ec2: yes}", "found True"),
        ("p5.48xlarge: {ec2: .inf}", "found inf"),
        ("p5.48xlarge: {ec2: .nan}", "found nan"),
        ("p5.48xlarge: {ec2: '1.23'}", "found '1.23'"),
        ("p5.48xlarge: 1.23", "p5.48xlarge: found 1.23, expected {"),
        ("- p5.48xlarge", "expected {instance: {ec2:"),
        ("", "found None"),
        ("p5.48xlarge: {ec2: 1", "neither YAML nor JSON"),
        ("p5.48xlarge: !!python/object/apply:os.getcwd []", "neither YAML nor JSON"),
    ],
)
def test_a_damaged_file_of_prices_is_refused_by_its_entry(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"--prices_file={file}")) as caught:
        price(instance("p5"), "ec2", prices_file=file)
    assert part in str(caught.value)


def test_a_missing_file_of_prices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        price(instance("p5"), "ec2", prices_file=tmp_path / "none.yaml")


def test_spot_prices_seen_are_below_those_on_demand_and_dated() -> None:
    bands = {row.name: band for row in instances() if (band := spot_seen(row)) is not None}
    assert "p5.48xlarge" in bands
    for name, band in bands.items():
        on_demand = instance(name).ec2
        assert on_demand is not None and 0 < band.low < band.high < on_demand.dollars_per_hour
        assert band.date and band.source
