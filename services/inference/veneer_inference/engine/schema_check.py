"""Whether answers can be held to a JSON schema, found out where it may take as long and as much as it likes.

Some schemas take llguidance time that doubles with each of their parts (an `allOf` of thirty patterns: days), and it
cannot be told to stop. So a schema is tried in a process of its own first, which the kernel ends beyond its bounds:
`python -m veneer_inference.engine.schema_check SECONDS`, with the grammar on its standard input. What passes is
compiled in the engine, in no more time.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

from llguidance import LLMatcher, LLParserLimits

LIMITS = LLParserLimits(verbose_errors=False)
_CPU_S = 3  # the slowest of the largest schemas that were found to pass took 0.4
_MEMORY_BYTES = 2 << 30
_WALL_S = 60.0  # on a machine that has little time for it


def problems_of(grammar: str) -> list[str]:
    """What is wrong with a grammar; nothing where answers can be held to all of it."""
    command = [sys.executable, "-m", "veneer_inference.engine.schema_check", str(_CPU_S)]
    try:
        tried = subprocess.run(  # noqa: S603  # ourselves
            command, input=grammar.encode(), capture_output=True, timeout=_WALL_S, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return ["it takes more time or memory than a schema may"]
    problems: list[str] = json.loads(tried.stdout)
    return problems


def main() -> None:
    """Tries the grammar on the standard input, and prints a JSON list of what is wrong with it."""
    cpu_s = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    failed, messages = LLMatcher.validate_grammar_with_warnings(sys.stdin.read(), None, limits=LIMITS)
    # A warning says that a part of the schema would not be held to.
    sys.stdout.write(json.dumps(messages or ["it cannot be read"] if failed or messages else []))


if __name__ == "__main__":
    main()
