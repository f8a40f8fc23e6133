"""The book's pages about the package, from its source alone: no module is imported.

A page for each module: its definitions in their order, with the comments beside their parameters, the docstring, the
cell of the notebook that each was exported from, and the source, folded.
"""
import ast
import json
import re
from dataclasses import dataclass, field
from posixpath import dirname, normpath

ORIGIN = re.compile(r"^# %% (\S+\.ipynb) #(\S+)$", re.M)
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
ORPHAN = "---", "orphan: true", "---", ""  # the list of modules leads here, the tree at the side would grow too long
LONGEST = 100  # characters of a constant's value
KEPT = re.compile(r"(`+[^`]+`+)")  # code in a docstring stays as it is


def plain(text: str) -> str:
    "Words of a docstring or a comment as Markdown: nothing but code in ticks is markup."
    pieces = KEPT.split(text)
    return "".join(p if i % 2 else re.sub(r"([\\*_$<>\[\]{}#|~])", r"\\\1", p) for i, p in enumerate(pieces))


def first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


@dataclass
class Module:
    "A module of the package: its text, and where each line of it was exported from"

    path: str  # relative to the repository
    text: str
    tree: ast.Module = field(init=False)

    def __post_init__(self):
        self.tree, self.lines = ast.parse(self.text), self.text.split("\n")
        origins = ((m.start(), m) for m in ORIGIN.finditer(self.text))
        self.origins = [(self.text.count("\n", 0, at) + 1, m[1], m[2]) for at, m in origins]

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")

    @property
    def public(self) -> list[str]:
        "What `__all__` lists."
        assigned = (n for n in self.tree.body if isinstance(n, ast.Assign))
        lists = [n.value for n in assigned if ast.unparse(n.targets[0]) == "__all__"]
        return ast.literal_eval(lists[-1]) if lists else []

    def origin(self, node: ast.AST) -> tuple[str, str] | None:
        "The notebook, relative to the repository, and the cell that a statement comes from."
        above = [o for o in self.origins if o[0] < node.lineno]
        if not above:
            return None
        _, notebook, cell = above[-1]
        return normpath(f"{dirname(self.path)}/{notebook}"), cell

    def source(self, node: ast.AST) -> str:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(self.lines[first - 1 : node.end_lineno])

    def remark(self, line: int) -> str:
        "The comment at the end of a line."
        m = re.search(r"(?:^|\s)#\s*(?!noqa|type:|style:|chkstyle)(.+)$", self.lines[line - 1])
        return m[1].split(" # noqa")[0].strip() if m else ""


def remarks(module: Module, node: FUNCTION) -> list[tuple[str, str]]:
    "The parameters of a function with the comments beside them; those of one line share its comment."
    found: dict[int, list[str]] = {}
    a = node.args
    named = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    defaults = dict(zip([x.arg for x in [*a.posonlyargs, *a.args]][::-1], a.defaults[::-1]))
    defaults |= {x.arg: d for x, d in zip(a.kwonlyargs, a.kw_defaults) if d}
    for arg in filter(None, named):
        end = defaults.get(arg.arg, arg).end_lineno
        if arg.arg not in ("self", "cls"):
            found.setdefault(end, []).append(arg.arg)
    last = node.body[0].lineno - 1  # a comment behind the colon of a signature in one line is about its parameters, too
    pairs = [(names, module.remark(line)) for line, names in found.items() if line <= max(last, node.lineno)]
    return [("`" + "`, `".join(names) + "`", remark) for names, remark in pairs if remark]


def result(module: Module, node: FUNCTION) -> str:
    "The comment beside what a function returns, if that has a line of its own."
    if not node.returns:
        return ""
    line = node.returns.end_lineno
    taken = {x.lineno for x in [*node.args.args, *node.args.kwonlyargs]}
    return "" if line in taken else module.remark(line)


def fenced(directive: str, argument: str, body: list[str], ticks: int) -> list[str]:
    return [f"{'`' * ticks}{{{directive}}} {argument}", *body, "`" * ticks, ""]


def signature(node: FUNCTION, method: bool = False) -> str:
    args = ast.unparse(node.args)
    if method:
        args = re.sub(r"^(self|cls)(, )?", "", args)
    return f"({args})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def words(module: Module, node: ast.AST) -> list[str]:
    "Docstring, parameters, result."
    doc = ast.get_docstring(node)
    body = [plain(doc), ""] if doc else []
    if isinstance(node, FUNCTION):
        body += [f"- {names}: {plain(remark)}" for names, remark in remarks(module, node)]
        returned = result(module, node)
        body += [f"- returns {plain(returned)}"] if returned else []
    return [*body, ""]


def fields(module: Module, node: ast.ClassDef) -> list[str]:
    "What an instance holds: the annotated names of a dataclass, with their comments."
    rows = []
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            default = f" = {ast.unparse(part.value)}" if part.value else ""
            said = module.remark(part.end_lineno)
            name = f"`{part.target.id}: {ast.unparse(part.annotation)}{default}`"
            rows.append(f"- {name}" + (f": {plain(said)}" if said else ""))
    return [*rows, ""] if rows else []


def folded(module: Module, node: ast.AST, where: str) -> list[str]:
    "The source, and the cell that it was written in."
    link = [f'<p class="written">written in {where}</p>', ""] if where else []
    return [*link, "<details class=\"source\"><summary>source</summary>", "", "```python", module.source(node), "```",
            "", "</details>", ""]


def definition(module: Module, node: ast.AST, where: str) -> list[str]:
    "One public definition."
    if isinstance(node, FUNCTION):
        body = words(module, node) + folded(module, node, where)
        return fenced("py:function", node.name + signature(node), body, 4)
    if isinstance(node, ast.ClassDef):
        return of_class(module, node, where)
    value = ast.unparse(node.value) if node.value else ""
    name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    short = value and len(value) <= LONGEST and "\n" not in value
    shown = [f":value: {json.dumps(value, ensure_ascii=False)}"] if short else []
    return fenced("py:data", name, [*shown, "", "", plain(module.remark(node.end_lineno)), ""], 4)


def of_class(module: Module, node: ast.ClassDef, where: str) -> list[str]:
    "A class with its public methods."
    methods = [n for n in node.body if isinstance(n, FUNCTION)]
    init = next((n for n in methods if n.name == "__init__"), None)
    body = words(module, node) + fields(module, node)
    if init:
        body += words(module, init)
    for method in methods:
        if method.name.startswith("_"):
            continue
        marks = [ast.unparse(d) for d in method.decorator_list]
        held = any(m.endswith("property") for m in marks)
        kind = "py:property" if held else "py:method"
        called = "" if held else signature(method, "staticmethod" not in marks)
        body += fenced(kind, method.name + called, words(module, method), 4)
    body += folded(module, node, where)
    return fenced("py:class", node.name + (signature(init, True) if init else ""), body, 5)


def named(node: ast.AST) -> str:
    "The name that a statement of a module defines."
    if isinstance(node, FUNCTION | ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else ""


def defined(module: Module) -> list[ast.AST]:
    "The public definitions, each once: the last is the one that counts."
    public = set(module.public) - {"__all__"}
    last = {named(node): node for node in module.tree.body if named(node) in public}
    return [node for node in module.tree.body if node in last.values()]


def module_page(module: Module, book, name: str) -> str:
    "The page of a module."
    up = "../" * name.count("/")
    lines = [*ORPHAN, f"# {module.name}", f"> {plain(ast.get_docstring(module.tree) or '')}", "",
             f'<p class="page-line"><a href="{up}api/index.html">all modules</a></p>', "",
             "```{py:module} " + module.name, "```", ""]
    for node in defined(module):
        origin, where = module.origin(node), ""
        if origin and origin[0] in book.pages:
            notebook, cell = origin
            place, page = f"cell-id={cell}", book.pages[notebook]
            book.reached.setdefault(notebook, set()).add(place)
            where = f'<a href="{up}{page.name}.html#{place}">{page.title}</a>'
        lines += definition(module, node, where)
    return "\n".join(lines)


def pages(book) -> dict[str, str]:
    "Every page about the package: its name and its Markdown."
    found, rooms = {}, {}
    for path, name in book.modules.items():
        module = Module(path, (book.root / path).read_text("utf-8"))
        found[name] = module_page(module, book, name)
        rooms.setdefault(dirname(name), []).append((name, first_line(ast.get_docstring(module.tree))))
    lines = ["# The package, module by module",
             "> What each module offers: from the notebooks, with the comments beside the parameters.", ""]
    for room, modules in rooms.items():
        lines += [f"## {'wikidpo' + room.removeprefix('api').replace('/', '.')}", ""]
        for name, said in modules:
            lines.append(f"- [{name.split('/')[-1]}]({name.removeprefix('api/')}.md): {plain(said)}")
        lines.append("")
    return {**found, "api/index": "\n".join(lines)}
