"""``report.html``: a run directory as one page that any browser shows, with nothing to fetch and nothing to install.

In this order: `history` reads the files -> `pictures` says what is drawn -> `curves` and `svg` draw it -> `page` puts
it together. `environment` is what a run notes about itself when it starts.
"""

from swin_scale.report.environment import environment
from swin_scale.report.write import write_report

__all__ = ["environment", "write_report"]
