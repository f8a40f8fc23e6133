"Sphinx's settings for the book; tools/book.py has written the pages that it reads. `make docs` runs both."
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
settings = ConfigParser()
settings.read(ROOT / "settings.ini", encoding="utf-8")
ours = settings["DEFAULT"]

project, author, version = ours["title"], ours["author"], ours["version"]
release, copyright = version, ours["copyright"]
extensions = ["myst_nb"]
exclude_patterns = ["files"]  # what pages link to and is no page

nb_execution_mode = "off"  # the committed outputs are the evidence
nb_render_markdown_format = "myst"  # tables in outputs
nb_merge_streams = True
nb_code_prompt_show = "the code behind this"
nb_code_prompt_hide = "the code behind this"
smartquotes_action = "q"  # quotes, but two dashes stay the two dashes of an option
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a notebook may go from # to ###

mathjax_path = "tex-svg.js"  # one file, with its fonts: no other host is asked
mathjax3_config = {"options": {"enableMenu": False}}

html_theme = "furo"
html_title = project
html_baseurl = f"{ours['doc_host']}{ours['doc_baseurl']}/"
html_static_path = ["static", "../_docs/static"]  # ours, MathJax
html_extra_path = ["../_docs/extra"]  # the notebooks as they are, to download
templates_path = ["templates"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_favicon = "static/icon.svg"
html_logo = "static/icon.svg"
html_copy_source = False
html_show_sphinx = False
html_context = {"description": ours["description"], "social": f"{html_baseurl}_static/social.png"}
html_theme_options = {
    "source_repository": ours["git_url"],
    "source_branch": ours["branch"],
    "top_of_page_buttons": [],  # each page has a line of its own
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
pygments_style, pygments_dark_style = "friendly", "monokai"
maximum_signature_line_length = 60
add_module_names = False
python_use_unqualified_type_names = True
