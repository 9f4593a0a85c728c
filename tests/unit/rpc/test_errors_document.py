"""docs/errors.md tells of every reason that the source can give, under the right status, and of no other."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from veneer_rpc import errors

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "errors.md"
CALLS, FIELDS, FAILURES = "Reasons of calls", "Reasons of fields", "Reasons of failures"
STATUS_OF = {
    kind.__name__: re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper()
    for kind in errors.VeneerError.__subclasses__()
} | {"_refuse_more": "RESOURCE_EXHAUSTED"}
FAILED = {"Failed", "Failure", "Refused", "failure"}
# What hands on a reason that was given elsewhere, or is a finding's code; `key` begins a message of the engine.
HANDED_ON = re.compile(r"key|reason|\w+(\.\w+)*\.(reason|code)")
Reasons = dict[str, set[str]]


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Every call in the source: of which part, the last word of what is called, and the call."""
    for part in ("services", "clients/python"):
        for file in sorted((ROOT / part).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                    yield part, node.func.id if isinstance(node.func, ast.Name) else node.func.attr, node


def given() -> dict[str, Reasons]:
    """The statuses of each reason, by chapter of the page; fields and failures have none."""
    found: dict[str, Reasons] = {chapter: defaultdict(set) for chapter in (CALLS, FIELDS, FAILURES)}
    for part, name, call in calls():
        is_violation = name == "Violation" or (name == "add" and len(call.args) == 3)
        place = 1 if is_violation else 0
        if len(call.args) <= place or not (is_violation or name in STATUS_OF or name in FAILED):
            continue
        reason = call.args[place]
        if not isinstance(reason, ast.Constant):
            passed_on = HANDED_ON.fullmatch(ast.unparse(reason)) or name == "add"
            assert passed_on, f"line {call.lineno}: a reason must be written out: {ast.unparse(call)}"
        elif not (isinstance(reason.value, str) and errors.REASON.fullmatch(reason.value)):
            continue
        elif is_violation:
            found[FIELDS][reason.value] = set()
        elif name in FAILED:
            found[FAILURES][reason.value] = set()
        elif name != "Internal" or part != "services" or reason.value == "INTERNAL":  # a service tells others as that
            found[CALLS][reason.value].add(STATUS_OF[name])
    found[FIELDS]["MORE_VIOLATIONS"] = set()
    return found


def told() -> tuple[dict[str, Reasons], list[tuple[str, str]]]:
    """The same as the page has it, and its rows in their order."""
    found: dict[str, Reasons] = {}
    rows = []
    for chapter in (CALLS, FIELDS, FAILURES):
        text = DOCUMENT.read_text("utf-8").partition(f"## {chapter}\n")[2].partition("\n## ")[0]
        found[chapter] = {}
        for reason, rest in re.findall(r"^\| `([A-Z0-9_]+)` \| (.+) \|$", text, re.MULTILINE):
            cells = rest.split(" | ")
            assert len(cells) == (2 if chapter == CALLS else 1), reason
            assert len(cells[-1]) > 10, f"{reason} says nothing"
            found[chapter][reason] = set(cells[0].split(", ")) if chapter == CALLS else set()
            rows.append((chapter, reason))
    return found, rows


def test_every_reason_is_told_and_no_other() -> None:
    (shown, rows), found = told(), given()
    wrong = [
        f"{chapter}: {reason} is {sorted(shown[chapter].get(reason, ['not told']))}, must be {sorted(statuses)}"
        for chapter, reasons in found.items()
        for reason, statuses in reasons.items()
        if shown[chapter].get(reason) != statuses
    ]
    wrong += [f"{chapter}: {reason} is given nowhere" for chapter, reason in rows if reason not in found[chapter]]
    assert not wrong, "mend docs/errors.md:\n" + "\n".join(wrong)
    assert len(rows) == len(set(rows))
    for chapter in (CALLS, FIELDS, FAILURES):
        reasons = [reason for its, reason in rows if its == chapter]
        assert reasons == sorted(reasons), chapter
