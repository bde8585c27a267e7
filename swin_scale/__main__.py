"""`python -m swin_scale` is the console script `swin-scale`."""

import sys

from swin_scale.cli import main

sys.exit(main())
