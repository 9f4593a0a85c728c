"""What is odd about answers, pictures and splits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer_dataset.domain.answers import AnswerCensus, answer_warnings, instruction_in
from veneer_dataset.domain.pictures import NEAR_EDGE, PictureFacts, PictureTable, is_too_thin, shape_warning
from veneer_dataset.domain.splits import Fractions, given_split, split_of_group, stratified_splits


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        ("请提取图中文字:欢迎来到人工智能时代", "请提取图中文字"),
        ("解释这张图表:第四季度销售额同比增长23%", "解释这张图表"),
        ("请提取图中文字\uff1a欢迎来到人工智能时代", "请提取图中文字"),
        ("Extract the text: hello", "Extract the text"),
        ("这张图片展示了一个红色的消防车正在街道上行驶。", None),
        ("表格包含三列:产品名称、单价、数量。", None),
        ("Total: 12", None),
        ("Read", None),
    ],
)
def test_an_instruction_inside_the_text(text: str, instruction: str | None) -> None:
    assert instruction_in(text) == instruction


@pytest.mark.parametrize(
    ("text", "codes"), [("fine", []), (" \n", ["ANSWER_BLANK"]), ("x" * 8001, ["ANSWER_VERY_LONG"])]
)
def test_one_answer(text: str, codes: list[str]) -> None:
    assert [code for code, _ in answer_warnings(text, is_pair=True)] == codes


@pytest.mark.parametrize(
    ("answers", "codes"),
    [
        (["a"] * 4, []),
        (["a"] * 5, ["ANSWERS_CONSTANT"]),
        (["a"] * 50 + ["b"] * 5, ["ANSWERS_IMBALANCED"]),
        (["a"] * 40 + ["b"] * 5, []),
        (["有趣"] * 10 + ["fun"] * 10, ["LANGUAGES_MIXED"]),
        ([str(number) for number in range(60)] + ["0"] * 600, []),
    ],
)
def test_all_answers(answers: list[str], codes: list[str]) -> None:
    census = AnswerCensus()
    for answer in answers:
        census.add(answer)
    assert [code for code, _ in census.warnings()] == codes


@pytest.mark.parametrize(
    ("width", "height", "code"), [(28, 28, None), (27, 900, "PICTURE_TINY"), (2100, 100, "PICTURE_EXTREME")]
)
def test_shapes(width: int, height: int, code: str | None) -> None:
    warning = shape_warning(PictureFacts(width, height))
    assert (warning[0] if warning else None) == code
    assert is_too_thin(PictureFacts(1, 201))
    assert not is_too_thin(PictureFacts(1, 200))


@given(
    st.lists(st.tuples(st.integers(1, 2**64 - 1), st.sampled_from([(128, 300), (300, 127)])), max_size=60),
    st.sets(st.integers(0, 63), max_size=2),
)
def test_near_duplicates_are_found_and_only_those(
    pictures: list[tuple[int, tuple[int, int]]], flipped: set[int]
) -> None:
    if pictures:
        pictures = [*pictures, (pictures[0][0] ^ sum(1 << bit for bit in flipped), (128, 128))]
    table = PictureTable()
    for index, (code, size) in enumerate(pictures):
        table.note(table.index(index.to_bytes(32, "big")), PictureFacts(*size, code))
    first = [
        next(
            (
                earlier
                for earlier, (other, its_size) in enumerate(pictures[:later])
                if min(*size, *its_size) >= NEAR_EDGE and code and other and (code ^ other).bit_count() <= 2
            ),
            -1,
        )
        for later, (code, size) in enumerate(pictures)
    ]
    assert table.near_duplicates().tolist() == first


@pytest.mark.parametrize(("edge", "alike"), [(128, 0), (127, -1)])
def test_near_duplicates_are_not_looked_for_among_icons(edge: int, alike: int) -> None:
    table = PictureTable()
    for number, size in enumerate([(128, 128), (edge, 400)]):
        table.note(table.index(bytes([number]) * 32), PictureFacts(*size, 0b1011))
    assert table.near_duplicates().tolist() == [-1, alike]


@pytest.mark.parametrize(
    ("row", "file", "path", "split"),
    [
        ("test", "train", "x.jsonl", "test"),
        ("", "dev-2", "val.jsonl", "dev-2"),
        ("", "", "data/val.jsonl", "validation"),
        ("", "", "dev.json", "validation"),
        ("", "", "test.jsonl", "test"),
        ("", "", "rows.jsonl", "train"),
    ],
)
def test_given_splits(row: str, file: str, path: str, split: str) -> None:
    assert given_split(row, file, path) == split


def test_fractions_are_by_content_and_about_as_asked() -> None:
    fractions = Fractions({"train": 0.8, "validation": 0.1, "test": 0.1})
    splits = [split_of_group(fractions, f"{number:064x}") for number in range(5000)]
    assert splits[:100] == [split_of_group(fractions, f"{number:064x}") for number in range(100)]
    assert abs(splits.count("train") / 5000 - 0.8) < 0.03


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.sampled_from("abc"), max_size=120))
def test_stratified_splits_keep_the_shares_of_each_answer(class_by_group: dict[str, str]) -> None:
    splits = stratified_splits(Fractions({"train": 0.75, "test": 0.25}, stratified=True), class_by_group)
    assert splits.keys() == class_by_group.keys()
    for answer in set(class_by_group.values()):
        groups = [group for group, each in class_by_group.items() if each == answer]
        test = sum(splits[group] == "test" for group in groups)
        assert abs(test - len(groups) / 4) <= 0.5


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40)), st.integers(0, 3000))
def test_a_picture_has_one_index_however_often_it_is_named(named: list[int], more: int) -> None:
    table, first = PictureTable(), dict[int, int]()
    for entry, number in enumerate([*named, *range(100, 100 + more), *named]):
        index = table.index(number.to_bytes(32, "big"), entry)
        assert first.setdefault(number, index) == index
    assert len(table) == len(first)
    assert list(table.digests()) == [number.to_bytes(32, "big").hex() for number in first]
    for number, index in first.items():
        table.note(
            index, PictureFacts(number + 1, 2, number, "PICTURE_BROKEN" if number % 2 else "", "x" * (number % 2))
        )
    for number, index in first.items():
        assert table.facts(index).width == number + 1
        assert table.facts(index).code == ("PICTURE_BROKEN" if number % 2 else "")
        assert table.size(number.to_bytes(32, "big").hex()) == (number + 1, 2)
