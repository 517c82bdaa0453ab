"""`hypershard launch slurm`: write a job's sbatch file, or hand it to sbatch at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..launch.build import build_job
from ..launch.slurm import CPU_NODES, SlurmOptions, render
from ..launch.slurm_files import RUN_DIR, plan_for, write_all
from ..log import setup_logging
from ..models.files import available_models
from .launch_flags import named_values
from .launch_output import Starter, deliver
from .launch_plan import planned

_DESCRIPTION = """\
Train on a Slurm cluster, HyperPod's included. The job's file is submitted, printed (--dry_run) or written (--write).
Flags that are not listed here are flags of `hypershard train`, --config FILE (a run file) among them.
"""
_EXAMPLES = """\
examples:
  hypershard launch slurm --model llama3_8b --instance p5 --nodes 4 --dataset=/fsx/data/bins --train_batch_size=2
  hypershard launch slurm --model llama3_8b --dry_run
  hypershard launch slurm --model llama3_8b --image=/fsx/images/hypershard.sqsh --mounts=/fsx:/fsx --write my_8b.sbatch
  hypershard launch slurm --write slurm/
"""
_SBATCH = Starter(words=("sbatch",))
_DIRECTIVES = ("partition", "account", "qos", "constraint", "reservation")


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "slurm",
        help="submit or write an sbatch file",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="NAME", help="model file, as of `hypershard train`")
    parser.add_argument(
        "--instance", metavar="TYPE", help=f"p5, p5.48xlarge, ..., or {CPU_NODES}; default: the model's"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="default: the model's")
    parser.add_argument("--hours", type=float, metavar="X", help="the job's time limit; default: the model's")
    parser.add_argument(
        "--run_dir",
        default=RUN_DIR,
        metavar="DIR",
        help="folder of the run, which all nodes see; %%x is the job's name, %%j its number (default: %(default)s)",
    )
    parser.add_argument("--name", help="the job's name; default: made of model, instance and nodes")
    parser.add_argument("--image", help="container image, for clusters with Pyxis; default: no container")
    parser.add_argument("--mounts", default="", metavar="/A:/B,...", help="what the container sees besides the run")
    parser.add_argument("--venv", default="", metavar="DIR", help="virtual environment to activate; default: none")
    parser.add_argument("--max_restarts", type=int, default=3, metavar="N", help="starts without progress (default: 3)")
    parser.add_argument("--save_seconds", type=int, metavar="N", help="longest last save; default: the model's")
    parser.add_argument(
        "--environment", action="append", default=[], metavar="NAME=VALUE", help="variable for every rank; repeatable"
    )
    parser.add_argument("--no_gres", action="store_true", help="the cluster does not count GPUs; do not ask for them")
    for name in _DIRECTIVES:
        parser.add_argument(f"--{name}", metavar="NAME", help=f"sbatch's --{name}")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--dry_run", action="store_true", help="print the file, submit nothing")
    output.add_argument(
        "--write", type=Path, metavar="PATH", help="write it to a file; a folder and no --model: one for every model"
    )
    parser.set_defaults(do=slurm, takes_train_flags=True, train_flags=[])


def slurm(args: argparse.Namespace) -> int:
    """Print, write or submit. Raises ConfigError for wrong flags, HypershardError with what sbatch said."""
    setup_logging()
    if args.write is not None and args.model is None and not args.train_flags:
        for path in write_all(args.write, available_models()):
            print(path)
        return 0
    deliver(_text(args), _SBATCH, dry_run=args.dry_run, write=args.write)
    return 0


def _text(args: argparse.Namespace) -> str:
    plan = plan_for(args.model)
    instance = args.instance or plan.instance
    instance = None if instance == CPU_NODES else instance
    num_nodes = plan.num_nodes if args.nodes is None else args.nodes
    job = build_job(
        train_flags=args.train_flags,
        model_name=args.model,
        instance=instance,
        num_nodes=num_nodes,
        run_dir=args.run_dir,
        hours=plan.hours if args.hours is None else args.hours,
        image=args.image,
        max_restarts=args.max_restarts,
        name=args.name,
        extra_environment=named_values("--environment", args.environment),
    )
    planned(args.model, instance, num_nodes=num_nodes, train_flags=args.train_flags)
    options = SlurmOptions(
        file=str(args.write) if args.write is not None else "FILE",
        directives=tuple((name, getattr(args, name)) for name in _DIRECTIVES if getattr(args, name) is not None),
        counts_gpus=not args.no_gres,
        save_seconds=plan.save_seconds if args.save_seconds is None else args.save_seconds,
        venv=args.venv,
        mounts=args.mounts,
    )
    return render(job, options)
