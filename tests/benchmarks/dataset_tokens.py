"""Token counts of rows, against the bare tokenizer's batch over the same texts.

python tests/benchmarks/dataset_tokens.py [ROWS]
"""

import statistics
import sys
import time

import tokenizers

from veneer_base.unfold import base_directory
from veneer_dataset.domain.tokens import Counting, count_rows
from veneer_processing import Processor

RUNS = 5


def main(count: int) -> None:
    directory = base_directory()
    processor = Processor.load(directory, "ab" * 32)
    counting = Counting("models/m", "", processor, 1 << 20)
    sentence = "表格包含三列:产品名称、单价、数量。其中A款手机售价5999元,库存12台。 The total is 5,999 yuan. " * 4
    questions = [f"请分析这张表单的内容 {number}" for number in range(count)]
    answers = [f"{sentence}{number}" for number in range(count)]  # equal ones would be counted once
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    bare = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    own, peer = [], []
    for _ in range(RUNS):
        start_s = time.perf_counter()
        for at in range(0, count, 512):
            count_rows(counting, rows[at : at + 512], lambda _: (1, 1))
        own.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        for at in range(0, count, 512):
            bare.encode_batch_fast([*questions[at : at + 512], *answers[at : at + 512]])
        peer.append(time.perf_counter() - start_s)
    own_s, peer_s = statistics.median(own), statistics.median(peer)
    print(f"counted {count / own_s:,.0f} rows/s, bare tokenizer {count / peer_s:,.0f} rows/s: {peer_s / own_s:.0%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
