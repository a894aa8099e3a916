"""The report page: one HTML file about one or several runs, which works offline.

`read_runs` (`runs.py`) reads what runs have written, `page_data` (`content.py`) turns it into what
the page shows, `write_page` (`html.py`) embeds that, Plotly, and the scripts of this folder.
"""

from .html import REPORT, write_page
from .runs import find_runs, read_runs

__all__ = ["REPORT", "find_runs", "read_runs", "write_page"]
