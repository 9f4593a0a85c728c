"""`python -m veneer_cluster.demo` plays both scenes; with `--full` the owner's own job at full size.

Exits with 0 when every scene reached what was asked of it, 1 when not, 130 when interrupted; writes a report.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from veneer_client import VeneerError
from veneer_client.cli import as_text
from veneer_cluster import machine
from veneer_cluster.demo import full, play, scenes
from veneer_cluster.demo.local import local_cluster

DOCUMENTED = Path("docs/base.md")
_FIGURE = re.compile(r"office documents[^\n]*?(\d+(?:\.\d+)?) ?%", re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m veneer_cluster.demo", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the owner's own job at full size")
    parser.add_argument("--base", help="directory or hub id; by default the demonstration base, or random weights")
    parser.add_argument("--scene", choices=[scene.name for scene in scenes.SCENES], help="only this one")
    parser.add_argument("--dir", type=Path, help="keep the cluster's folder here; by default it is removed")
    parser.add_argument("--report", type=Path, default=Path("demo-report.json"), help="where the figures go")
    chosen = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="veneer-demo-") as temporary:
            return _run(chosen, Path(temporary))
    except VeneerError as error:
        print(as_text(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def documented_figure(path: Path = DOCUMENTED) -> float | None:
    """The share of document fields that `docs/base.md` promises; None where it says nothing of it."""
    try:
        found = _FIGURE.search(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    return float(found[1]) / 100 if found else None


def _run(chosen: argparse.Namespace, temporary: Path) -> int:
    started_s = time.monotonic()
    base = chosen.base
    if chosen.full and base is None:
        base = str(temporary / "qwen3-vl-2b-random")
        print("no base is named: random weights of Qwen3-VL-2B's shape are written", flush=True)
        write = ["base", "random", "--shape", "qwen3-vl-2b", "--out", base]
        # In a process of its own: it imports torch, which nothing here needs.
        subprocess.run([sys.executable, "-m", "veneer_client", *write], check=True)  # noqa: S603
    flags = ["--base", base] if base else []
    report: dict[str, object] = {"cores": machine.cores()}
    results = []
    with local_cluster(chosen.dir or temporary / "cluster", flags) as (client, cluster):
        if chosen.full:
            report["full"] = full.play(client, cluster, temporary / "office", chosen.base is None)
        else:
            for scene in scenes.SCENES:
                if chosen.scene in (None, scene.name):
                    published = documented_figure() if scene is scenes.DOCUMENTS else None
                    results.append(play.play(client, cluster, scene, temporary / scene.name, published))
        state = cluster.read_state()
        report["processes"] = [asdict(process) for process in state.processes] if state else []
    report["scenes"] = [asdict(result) for result in results]
    report["total_s"] = time.monotonic() - started_s
    report["passed"] = not any(result.missed for result in results)
    chosen.report.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", "utf-8")
    for result in results:
        print(result.line())
        for problem in result.missed:
            print(f"  missed: {problem}", file=sys.stderr)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
