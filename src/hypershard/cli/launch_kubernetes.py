"""`hypershard launch kubernetes`: write a job's manifests, or hand them to kubectl."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..launch.build import build_job, checked_flags
from ..launch.kubernetes import JOB, KINDS, KubernetesOptions, render
from ..launch.paths import warn_of_paths
from ..launch.sagemaker_flags import decode
from ..log import setup_logging
from .launch_flags import named_values
from .launch_output import Starter, deliver
from .launch_plan import planned

_DESCRIPTION = """\
Train on Kubernetes: an Indexed Job with one pod per node and a headless Service, which need nothing installed in the
cluster but the device plugins; or a HyperPodPyTorchJob for HyperPod's training operator. The manifests are applied,
printed (--dry_run) or written (--write). Flags that are not listed here are flags of `hypershard train`, --config FILE
(a run file) among them.
"""
_EXAMPLES = """\
examples:
  hypershard launch kubernetes --model llama3_8b --instance p5 --nodes 4 --image=REGISTRY/hypershard:1 \\
    --volume fsx-claim:/fsx --run_dir /fsx/runs/one --dataset=/fsx/data/bins --dry_run
  hypershard launch kubernetes … --kind HyperPodPyTorchJob --queue hyperpod-ns-team-localqueue --write job.yaml
"""
_HOURS, _MAX_RESTARTS = 24.0, 3
_KUBECTL = Starter(words=("kubectl", "apply", "-f"), for_stdin=("-",))
_TEXTS = {
    "namespace": "namespace; default: kubectl's own",
    "queue": "local queue of Kueue, as HyperPod task governance uses",
    "priority": "priority class of Kueue's workloads",
    "service_account": "service account, which gives the pods their AWS role; default: the namespace's",
}


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "kubernetes",
        help="write or apply the manifests of a job",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="NAME", help="model file, as of `hypershard train`")
    parser.add_argument("--instance", metavar="TYPE", help="p5, p5.48xlarge, ...; default: nodes without GPUs")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="pods, one on each node (default: 1)")
    parser.add_argument("--hours", type=float, default=_HOURS, metavar="X", help=f"time limit (default: {_HOURS:g})")
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="folder of the run, on a --volume")
    parser.add_argument("--image", metavar="IMAGE", help="container image, made by docker/Dockerfile")
    parser.add_argument(
        "--volume", action="append", default=[], metavar="CLAIM:/PATH", help="persistent volume claim; repeatable"
    )
    parser.add_argument("--name", help="the job's name; default: made of model, instance and nodes")
    parser.add_argument(
        "--max_restarts",
        type=int,
        default=_MAX_RESTARTS,
        metavar="N",
        help=f"of the ranks in their pods, and of the pods (default: {_MAX_RESTARTS})",
    )
    parser.add_argument("--kind", choices=KINDS, default=JOB, help="what is written (default: %(default)s)")
    parser.add_argument("--hyperpod", action="store_true", help="the nodes are HyperPod's, whose types are named ml.…")
    for name, text in _TEXTS.items():
        parser.add_argument(f"--{name}", metavar="NAME", help=text)
    parser.add_argument(
        "--environment", action="append", default=[], metavar="NAME=VALUE", help="variable for every rank; repeatable"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--dry_run", action="store_true", help="print the manifests, apply nothing")
    output.add_argument("--write", type=Path, metavar="FILE", help="write them to a file")
    parser.set_defaults(do=kubernetes, takes_train_flags=True, train_flags=[])


def kubernetes(args: argparse.Namespace) -> int:
    """Print, write or apply. Raises ConfigError for wrong flags, HypershardError with what kubectl said."""
    setup_logging()
    deliver(_text(args), _KUBECTL, dry_run=args.dry_run, write=args.write)
    return 0


def _text(args: argparse.Namespace) -> str:
    volumes = tuple(named_values("--volume", args.volume, sign=":", expected="CLAIM:/PATH").items())
    model, train_flags = _seen_by_pods(args, [path for _, path in volumes])
    job = build_job(
        train_flags=train_flags,
        model_name=model,
        instance=args.instance,
        num_nodes=args.nodes,
        run_dir=args.run_dir,
        hours=args.hours,
        image=args.image,
        max_restarts=args.max_restarts,
        name=args.name,
        extra_environment=named_values("--environment", args.environment),
    )
    planned(args.model, args.instance, num_nodes=args.nodes, train_flags=args.train_flags)
    options = KubernetesOptions(
        kind=args.kind,
        volumes=volumes,
        hyperpod=args.hyperpod,
        **{name: getattr(args, name) for name in _TEXTS},
    )
    return render(job, options)


def _seen_by_pods(args: argparse.Namespace, mounted: Sequence[str]) -> tuple[str | None, list[str]]:
    """The model and the flags of training. Pods see no run file of this machine: its settings become flags."""
    instead = "put it onto a --volume and give its path there"
    given = checked_flags(args.train_flags)
    config = Path(given["config"]) if "config" in given else None
    if config is None or not config.is_file() or any(config.is_relative_to(path) for path in mounted):
        warn_of_paths(given, seen=mounted, instead=instead)
        return args.model, args.train_flags
    named = [] if args.model is None else [f"--model={args.model}"]
    flags = decode([*named, *args.train_flags])
    warn_of_paths(flags.settings, seen=mounted, instead=instead)
    return None, flags.words
