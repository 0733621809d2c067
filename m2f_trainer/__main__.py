"""`python -m m2f_trainer`: the `m2f` command, for `torchrun -m` and `accelerate launch -m`."""

import sys

from m2f_trainer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
