"""Which cells of a notebook must run before one of them: read off the names that each cell uses and binds."""

import ast
import builtins
import symtable

LOOPED = "looped_"  # in front of the loop variables of comprehensions
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Names:
    """The names a cell imports, binds (perhaps, and surely), changes in place, uses at once, and uses in functions."""

    def __init__(self, source):
        from IPython.core.inputtransformer2 import TransformerManager

        tree = _own_names(ast.parse(TransformerManager().transform_cell(source)))
        self.now, self.later = set(), set()
        self.surely = self._follow(tree.body, set())
        top = symtable.symtable(ast.unparse(tree), "cell", "exec")
        symbols = [symbol for symbol in top.get_symbols() if not symbol.get_name().startswith(LOOPED)]
        self.imports = {s.get_name() for s in symbols if s.is_imported()}
        self.binds = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}
        for table in _below(top):
            self.later |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        self.changes = set(_changed(tree.body))

    def _follow(self, statements, bound):
        """Go through statements in the order they run; returns what is bound after them whatever way was taken. What
        is used before that is noted in `now`."""
        for statement in statements:
            bodies = {field: getattr(statement, field, []) for field in ("body", "orelse", "finalbody")}
            handlers = getattr(statement, "handlers", [])
            inside = {id(x) for held in (*bodies.values(), handlers) for x in held}
            if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):  # decorators and defaults run at once, the body later
                self.now |= {x.id for x in _names_of(statement, inside) if isinstance(x.ctx, ast.Load)} - bound
                bound |= {statement.name}
                continue
            used = {x.id for x in _names_of(statement, inside) if isinstance(x.ctx, ast.Load)}
            if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                used.add(statement.target.id)
            self.now |= used - bound
            bound |= {x.id for x in _names_of(statement, inside) if isinstance(x.ctx, ast.Store)}
            if isinstance(statement, ast.Import | ast.ImportFrom):
                bound |= {(x.asname or x.name).split(".")[0] for x in statement.names}
            after = {field: self._follow(body, set(bound)) for field, body in bodies.items()}
            for handler in handlers:
                self._follow(handler.body, set(bound))
            if isinstance(statement, ast.If):
                bound |= after["body"] & after["orelse"]
            elif isinstance(statement, ast.With | ast.Try):
                bound |= after["body"] | after["finalbody"]
        return bound


def _own_names(tree):
    """The loop variables of comprehensions under names of their own: Python 3.12 counts them to the scope around."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            variables = {x.id for part in node.generators for x in ast.walk(part.target) if isinstance(x, ast.Name)}
            for x in ast.walk(node):
                if isinstance(x, ast.Name) and x.id in variables:
                    x.id = LOOPED + x.id
    return tree


def _names_of(node, outside):
    """The names in a statement's own line: not those in the statements it holds, nor those in a lambda."""
    if isinstance(node, ast.Name) and not node.id.startswith(LOOPED):
        yield node
    for child in ast.iter_child_nodes(node):
        if id(child) not in outside and not isinstance(child, ast.Lambda):
            yield from _names_of(child, outside)


def _below(table):
    for child in table.get_children():
        yield child
        yield from _below(child)


def _changed(statements):
    """Names whose values a cell may change in place: x[...] = ..., x.a = ..., x.append(...), fill(x)."""
    for statement in statements:
        if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
            continue
        for field in ("body", "orelse", "finalbody", "handlers"):
            yield from _changed(getattr(statement, field, []))
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        parts = [node for target in targets if target is not None for node in ast.walk(target)]
        stored = [node.value for node in parts if isinstance(node, ast.Subscript | ast.Attribute)]
        value = getattr(statement, "value", None)
        if isinstance(statement, ast.Expr) and isinstance(value, ast.Call):
            if isinstance(value.func, ast.Attribute):
                stored.append(value.func)
            elif isinstance(value.func, ast.Name) and not hasattr(builtins, value.func.id):  # not print(x)
                stored += [x for x in value.args if isinstance(x, ast.Name | ast.Subscript | ast.Attribute)]
        yield from (_base(node) for node in stored)


def _base(node):
    """The name at the root of x.a[0].b; none for x().b, which is a new value."""
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def needed(cells, target):
    """The numbers of the cells that must run before cell `target` (and it), in order. cells: sources."""
    names = [Names(source) for source in cells[: target + 1]]
    modules = set().union(*(cell.imports for cell in names))
    found, waiting = set(), [target]
    while waiting:
        cell = waiting.pop()
        if cell in found:
            continue
        found.add(cell)
        for name in names[cell].now | (names[cell].later - names[cell].surely):
            waiting += _sources_of(name, cell, names, name in modules)
        for name in names[cell].later:  # what a function meets when it is called is the newest binding
            waiting += [i for i in range(cell + 1, target) if name in names[i].binds]
    return sorted(found)


def _sources_of(name, cell, names, is_module):
    """The last cell before `cell` that surely binds a name, and those that bind or change it after that."""
    sources = []
    for i in range(cell - 1, -1, -1):
        if name in names[i].binds:
            sources.append(i)
            if name in names[i].surely:
                break
        elif name in names[i].changes and not is_module:
            sources.append(i)
    return sources
