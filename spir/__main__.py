"""``python -m spir`` is the ``spir`` command."""

import sys

from spir.cli import main

sys.exit(main())
