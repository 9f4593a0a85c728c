"""The owner's folders, pushed and looked at by the client and its commands, against the real service."""

import json
import re
import sys
import uuid
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from veneer.dataset.v1 import dataset_service_pb2 as pb
from veneer_base.synth import write_dataset
from veneer_client import Client, NotFound, cli

from .conftest import Service, png

Veneer = Callable[..., str]
COMMANDS = {
    **{name: f"dataset_looking:{name}" for name in ("diff", "report", "sample")},
    "push": "dataset:push",
    "show": "dataset:show",
}
INVOICE = "这是一张金额为 ¥8,650 的增值税发票,开票日期是2024年3月15日。"


@pytest.fixture
def veneer(
    service: Service, trainer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Veneer:
    """Runs `veneer dataset …` and returns what it printed."""
    where = {"DATASET": service.address, "TRAINER": trainer, "INFERENCE": "127.0.0.1:1", "TOKEN": service.user}
    for name, value in where.items():
        monkeypatch.setenv(f"VENEER_{name}", value)
    entries = [
        EntryPoint(f"dataset.{name}", f"veneer_client.commands.{at}", cli.COMMANDS) for name, at in COMMANDS.items()
    ]
    monkeypatch.setattr(cli, "entry_points", lambda group: entries)

    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["veneer", "dataset", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        assert (left.value.code or 0) == code, printed
        return printed.out if code == 0 else printed.err

    return run


def write(folder: Path, file: str, *rows: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


@pytest.fixture
def office(tmp_path: Path) -> Path:
    """The tutorial's office documents: the pictures lie in images/, and the lines do not say so."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    names = ["invoice_01.png", "table_02.jpg", "form_03.png"]
    for seed, name in enumerate(names):
        (folder / "images" / name).write_bytes(png(300 + seed, 80, 60))
    texts = [INVOICE, "请提取图中文字:欢迎来到人工智能时代", "该申请表填写了姓名张伟、部门技术部。"]
    write(folder, "train.jsonl", *({"image": name, "text": text} for name, text in zip(names, texts, strict=True)))
    return folder


@pytest.fixture
def name() -> str:
    return f"c{uuid.uuid4().hex[:12]}"


def test_the_tutorials_folder_as_it_lies_there(veneer: Veneer, office: Path, name: str) -> None:
    printed = veneer("push", office, "--name", name, "--prompt", "请描述图片")
    assert "3 accepted" in printed
    assert "PATH_SEARCHED: invoice_01.png lies at images/invoice_01.png" in printed
    assert "INSTRUCTION_IN_TEXT: 请提取图中文字" in printed
    assert "sent 0 files" in veneer("push", office, "--name", name)
    report = veneer("report", name)
    assert "3 = 3 accepted + 0 refused" in report
    assert re.search(r"PATH_SEARCHED +warning +3\n", report)
    assert json.loads(veneer("report", name, "--json"))["report"]["accepted_rows"] == "3"


def test_each_file_of_drawn_documents_is_a_split_of_its_own(veneer: Veneer, name: str, tmp_path: Path) -> None:
    counts = write_dataset(tmp_path / "d", rows=2, kinds=("invoice",), languages=("zh",))
    version = json.loads(veneer("push", tmp_path / "d", "--name", name, "--json"))["version"]
    assert {each["split"]: int(each["row_count"]) for each in version["splits"]} == counts
    assert len(json.loads(veneer("sample", name, "--split", "test_layout", "--count", 30, "--json"))) == 20


def test_sample_as_a_table_and_as_a_page(veneer: Veneer, office: Path, name: str, tmp_path: Path) -> None:
    with (office / "train.jsonl").open("a", encoding="utf-8") as file:
        hostile = {"image": "invoice_01.png", "prompt": "<script>x</script>", "text": "[red]\x1b[2J</p>"}
        file.write(json.dumps(hostile) + "\n")
    veneer("push", office, "--name", name)
    table = veneer("sample", name)
    assert INVOICE[:20] in table
    assert "[red]\ufffd[2J</p>" in table
    rows = json.loads(veneer("sample", name, "--json", "--count", 2, "--seed", 5))
    assert rows == json.loads(veneer("sample", name, "--json", "--count", 2, "--seed", 5))
    assert len(rows) == 2
    for model in ("", "models/tiny"):  # pictures as uploaded, or small ones
        if model:
            veneer("push", office, "--name", name, "--model", model)
        file = tmp_path / f"page{model[-4:]}.html"
        assert "4 rows are in" in veneer("sample", name, "--html", file)
        page = file.read_text("utf-8")
        assert page.count('<img alt="" src="data:image/') == 4
        assert INVOICE in page
        assert "PATH_SEARCHED" in page
        assert "&lt;script&gt;x&lt;/script&gt;" in page
        assert "<script" not in page
        assert not re.search(r'(src|href)="(?!data:)', page)
        assert ("Tokens of a row" in page) == bool(model)


def test_diff_tells_added_gone_changed_and_moved(veneer: Veneer, name: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{number}", "text": f"a{number}"} for number in range(300)]
    write(tmp_path / "d", "train.jsonl", *rows)
    veneer("push", tmp_path / "d", "--name", name)
    first = json.loads(veneer("report", name, "--json"))["digest"]
    rows[1]["text"] = "another"
    rows[2]["split"] = "test"
    write(tmp_path / "d", "train.jsonl", *rows[:3], *rows[4:], {"prompt": "new", "text": "row"})
    veneer("push", tmp_path / "d", "--name", name)
    printed = veneer("diff", f"{name}@{first[:12]}", name)
    assert printed.splitlines() == [
        "1 added, 1 gone, 1 changed, 1 moved, 297 the same",
        "+ train  new → row",
        "- train  q3 → a3",
        "~ train  q1 → a1 ⇒ another",
        "» train ⇒ test  q2 → a2",
    ]
    found = json.loads(veneer("diff", f"{name}@{first[:12]}", name, "--json"))
    assert [len(found[kind]) for kind in ("added", "gone", "changed", "moved")] == [1, 1, 1, 1]
    assert veneer("diff", name, name).startswith("0 added, 0 gone, 0 changed, 0 moved, 300 the same")
    assert "VERSION_NOT_FOUND" in veneer("diff", f"{name}@{'0' * 12}", name, code=1)


def test_a_parquet_file_with_its_pictures(veneer: Veneer, name: str, tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = [png(41), png(42), b"no picture"]
    table = pa.table(
        {
            "image": pa.array([{"bytes": each, "path": "x.png"} for each in [*pictures, pictures[0]]], image),
            "text": ["一", "二", "三", "四"],
        }
    )
    (tmp_path / "d").mkdir()
    parquet.write_table(table, tmp_path / "d" / "test-00000-of-00001.parquet")
    done = json.loads(veneer("push", tmp_path / "d", "--name", name, "--json"))
    assert [(each["code"], each["path"], each["line"]) for each in done["findings"]] == [
        ("PICTURE_BROKEN", "test-00000-of-00001.parquet", "3")
    ]
    assert [(each["split"], each["row_count"]) for each in done["version"]["splits"]] == [("test", "3")]
    assert done["version"]["picture_count"] == "2"
    rows = json.loads(veneer("sample", name, "--split", "test", "--json"))
    assert {row["messages"][1]["parts"][0]["text"] for row in rows} == {"一", "二", "四"}


def test_splits_by_content(veneer: Veneer, name: str, tmp_path: Path) -> None:
    write(
        tmp_path / "d", "rows.jsonl", *({"prompt": f"q{i}", "text": f"a{i % 2}", "group": f"g{i}"} for i in range(100))
    )
    printed = veneer(
        "push", tmp_path / "d", "--name", name, "--split", "train=0.8", "--split", "test=0.2", "--stratified"
    )
    assert "test 20, train 80" in printed
    assert "such as train=0.8" in veneer("push", tmp_path / "d", "--name", name, "--split", "train", code=2)
    assert "go with --split" in veneer("push", tmp_path / "d", "--name", name, "--group", "field", code=2)


def test_a_dry_run_leaves_no_trace(veneer: Veneer, service: Service, office: Path, name: str) -> None:
    stub = service.stub()
    before = stub.ListDatasets(pb.ListDatasetsRequest(page_size=1000))
    would = json.loads(veneer("push", office, "--name", name, "--prompt", "读", "--dry-run", "--json"))
    assert stub.ListDatasets(pb.ListDatasetsRequest(page_size=1000)) == before
    veneer("push", office, "--name", name, "--prompt", "写")
    again = veneer("push", office, "--name", name, "--prompt", "读", "--dry-run", "--json")
    assert json.loads(again)["version"]["name"] == would["version"]["name"]
    assert stub.GetDataset(pb.GetDatasetRequest(name=f"datasets/{name}")).default_prompt == "写"
    kept = json.loads(veneer("push", office, "--name", name, "--prompt", "读", "--json"))
    assert kept["version"]["name"] == would["version"]["name"]


def test_pictures_larger_than_a_message_come_whole(service: Service, trainer: str, name: str, tmp_path: Path) -> None:
    big = png(7, 1400, 1300)
    assert len(big) > 5 << 20
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "big.png").write_bytes(big)
    write(tmp_path / "d", "train.jsonl", *({"image": "big.png", "text": f"t{i}"} for i in range(5)))
    with Client(dataset=service.address, trainer=trainer, inference=["127.0.0.1:1"], token=service.user) as client:
        client.datasets.push(tmp_path / "d", name)
        twin, loop = client.datasets._twin, client.datasets._loop
        rows = list(loop.iterate(twin.examples(name, offset=1, limit=3, picture_form=pb.PICTURE_FORM_ORIGINAL)))
        assert [row.index for row in rows] == [1, 2, 3]
        assert all(row.messages[0].parts[0].picture.data == big for row in rows)
        with pytest.raises(NotFound):
            list(loop.iterate(twin.examples(name, "none")))
