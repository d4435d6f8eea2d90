"""Write an executed notebook as one page that needs nothing else: `python -m tools.page <notebook> <page.html>`.

Its code is left out, and so is its first cell, which is about the notebook. Pictures and answers are inside the page;
it asks nothing of a network or a kernel.
"""

import argparse
import html
import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

STYLE = """
body { font: 15px/1.55 "DejaVu Sans", Verdana, sans-serif; color: #222; background: white; margin: 0 auto;
       max-width: 860px; padding: 12px 20px 40px; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 1.8em; }
img { max-width: 100%; height: auto; }
@media (max-width: 600px) { /* letters stay as large as those around: a picture is moved instead */
  body { padding: 8px 10px 30px; }
  .output_png { overflow-x: auto; }
  img { max-width: none; width: 520px; }
  th:first-child { white-space: normal; }
}
table { border: 0; border-collapse: collapse; font-size: 0.9em; display: block; overflow-x: auto; }
th, td { padding: 3px 10px; text-align: right; border: 0; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
a.anchor-link { display: none; }
pre { white-space: pre-wrap; }
"""


def page(notebook: Path) -> str:
    """An executed notebook as HTML. Its title is the heading that the first cell begins with."""
    found = nbformat.read(notebook, as_version=4)
    title = html.escape(re.match(r"# (.*)", found.cells[0].source)[1])
    found.cells = found.cells[1:]
    exporter = HTMLExporter(
        template_name="basic", exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(found)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("page", type=Path)
    given = parser.parse_args()
    given.page.parent.mkdir(parents=True, exist_ok=True)
    given.page.write_text(page(given.notebook), encoding="utf-8")


if __name__ == "__main__":
    main()
