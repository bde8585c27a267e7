"""``report.html``: a run directory as one page that any browser shows, with nothing to fetch and nothing to install.

In this order: `history` reads the files -> `pictures` says what is drawn -> `curves` and `svg` draw it -> `page` puts
it together; `routing` and `heat` are its part on MoE layers. `environment` is what a run notes about itself when it
starts. `survey` and `survey_page` make a page of their own: the routing of a trained model.
"""

from swin_scale.report.environment import environment
from swin_scale.report.write import write_report

__all__ = ["environment", "write_report"]
