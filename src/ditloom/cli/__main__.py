"""`python -m ditloom.cli`, for launchers that start modules."""

import sys

from ditloom.cli import main

sys.exit(main())
