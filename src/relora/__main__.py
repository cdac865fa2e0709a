"""The command line as a module, for launchers: `torchrun --nproc-per-node 4 -m relora pretrain CONFIG`."""

from relora.cli import main

main()
