"""hypershard: train language models with FSDP2 on Slurm, SageMaker and HyperPod."""

__version__ = "0.1.0"
