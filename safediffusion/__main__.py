"""`python -m safediffusion`."""

import sys

from safediffusion.cli.app import main

sys.exit(main())
