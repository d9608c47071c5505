"""Texts and load: lengths, texts, the user's own calls, and who takes which call."""

import asyncio
import json
import math
import random
import statistics

import pytest

from rerank_kit.benchmark.load import CLOSED, OPENED, TAKEN, Bench, Call, Gate, Level, drive
from rerank_kit.benchmark.texts import LONGEST, WORDS, FileTexts, Lengths, Texts, one_token_words

# --- texts ---


def test_texts_never_share_a_query_or_document():
    texts = Texts(3, 32, doc="20", query="6")
    calls = [texts.of_call(k) for k in range(300)]
    queries = [q for q, _ in calls]
    documents = [d for _, docs in calls for d in docs]
    assert len(set(queries)) == 300 and len(set(documents)) == 300 * 32
    assert {len(q.split()) for q in queries} == {6} and {len(d.split()) for d in documents} == {20}
    # No cached block (16 tokens) can serve two texts: they differ within the first words.
    assert len({tuple(d.split()[:5]) for d in documents}) == 300 * 32


def test_texts_come_again_with_the_seed_only():
    same = [Texts(5, 8).body("rerank", "m", k) for k in range(20)]
    assert same == [Texts(5, 8).body("rerank", "m", k) for k in range(20)]
    one, two = ({d for k in range(20) for d in Texts(seed, 8).of_call(k)[1]} for seed in (5, 6))
    assert not one & two


def test_texts_repeat():
    texts = Texts(5, 8, repeat="all")
    assert texts.of_call(0) == texts.of_call(7)
    texts = Texts(5, 8, repeat="query")
    (q0, d0), (q7, d7) = texts.of_call(0), texts.of_call(7)
    assert q0 == q7 and not set(d0) & set(d7)


def test_texts_have_the_lengths_asked_for():
    texts = Texts(1, 50, doc="64-128", query="lognormal:30,0.5")
    calls = [texts.of_call(k) for k in range(40)]
    lengths = {len(d.split()) for _, docs in calls for d in docs}
    assert min(lengths) == 64 and max(lengths) == 128 and len(lengths) == 65
    assert len({len(q.split()) for q, _ in calls}) > 15


# --- lengths ---


@pytest.mark.parametrize(
    "spec",
    ["4", "0", "-5", "32769", "64-32", "4-9", "100-40000", "1.5", "", "x", "lognormal:4,1", "lognormal:200,0",
     "lognormal:200,4", "lognormal:200", "lognormal:40000,1", "normal:5,1", "64 - 512"],
)  # fmt: skip
def test_lengths_refuse(spec):
    with pytest.raises(ValueError, match=r"is not a length|out of range"):
        Lengths.parse(spec)


def test_lengths_draw_what_they_say():
    rng = random.Random(1)
    assert {Lengths.parse("128").draw(rng) for _ in range(100)} == {128}
    uniform = [Lengths.parse("64-512").draw(rng) for _ in range(20_000)]
    assert min(uniform) == 64 and max(uniform) == 512
    assert statistics.mean(uniform) == pytest.approx(288, rel=0.02)
    assert statistics.pvariance(uniform) == pytest.approx((449**2 - 1) / 12, rel=0.03)
    lognormal = [Lengths.parse("lognormal:200,0.8").draw(rng) for _ in range(20_000)]
    assert statistics.mean(lognormal) == pytest.approx(200, rel=0.03)  # 4.4 standard errors
    assert statistics.stdev(map(math.log, lognormal)) == pytest.approx(0.8, rel=0.03)
    # The tail stays inside what can be written, and what Texts can slice.
    wide = [Lengths.parse("lognormal:20000,3").draw(rng) for _ in range(2000)]
    assert min(wide) == 5 and max(wide) == LONGEST == Lengths.parse("lognormal:20000,3").most


def byte_level_tokenizer(folder, texts, vocab_size):
    """A BPE tokenizer as Qwen's: "able" and " able" are different tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    tokenizer.enable_truncation(32)  # as all-MiniLM's tokenizer.json has it
    tokenizer.enable_padding(length=32)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def test_one_token_words_make_lengths_in_tokens(tmp_path):
    known = WORDS[:40]
    tokenizer = byte_level_tokenizer(tmp_path, [*known, *(f"x {w}" for w in known)] * 5, 2000)
    words = one_token_words(str(tmp_path))
    assert 20 <= len(words) <= 40 and set(words) <= set(known)
    texts = Texts(7, 20, doc="50-200", query="33", words=words)
    for k in range(5):
        query, documents = texts.of_call(k)
        assert len(tokenizer.encode(query).ids) == 33
        assert [len(tokenizer.encode(d).ids) for d in documents] == [len(d.split()) for d in documents]
    assert "of 50-200 tokens" in texts.about and "query of 33 tokens" in texts.about


def test_one_token_words_refuse_what_cannot_be_exact(tmp_path):
    byte_level_tokenizer(tmp_path / "few", ["able above"] * 5, 300)
    with pytest.raises(ValueError, match="too few English words as one token"):
        one_token_words(str(tmp_path / "few"))
    with pytest.raises(ValueError, match="no tokenizer in"):
        one_token_words(str(tmp_path))


# --- the user's own calls ---


def test_file_texts_send_the_lines_in_an_order_of_the_seed(tmp_path):
    lines = [{"query": f"q{i}", "documents": [f"d{i}{j}" for j in range(i + 1)]} for i in range(9)]
    lines[4]["instruction"] = "find"
    file = tmp_path / "calls.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    texts = FileTexts(str(file), seed=3)
    assert texts.lines == 9 and texts.about.endswith("calls.jsonl: 9 calls of 5.0 documents")
    sent = [texts.body("rerank", "m", k) for k in range(18)]
    bodies = [json.loads(body) for body, _ in sent]
    assert bodies[:9] == bodies[9:]  # from the start again
    assert sorted(b["query"] for b in bodies[:9]) == [f"q{i}" for i in range(9)]
    assert [n for _, n in sent] == [len(b["documents"]) for b in bodies]
    assert next(b for b in bodies if b["query"] == "q4") == {"model": "m", **lines[4]}
    assert "instruction" not in next(b for b in bodies if b["query"] == "q5")
    score = json.loads(FileTexts(str(file), 3).body("score", "m", 0)[0])
    assert (score["text_1"], score["text_2"]) == (bodies[0]["query"], bodies[0]["documents"])
    other = FileTexts(str(file), seed=4)
    assert [json.loads(other.body("rerank", "m", k)[0]) for k in range(9)] != bodies[:9]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "null", "7", '{"query": "q"}', '{"documents": ["d"]}', '{"query": "q", "documents": []}',
     '{"query": "q", "documents": "dd"}', '{"query": 1, "documents": ["d"]}', '{"query": "q", "documents": [null]}',
     '{"query": "q", "documents": ["d"], "instruction": 5}', '{"query": "q", "documents": {"d": 1}}', b"\xff\xfe"],
)  # fmt: skip
def test_file_texts_name_a_broken_line_and_send_the_rest(line, tmp_path, capsys):
    file = tmp_path / "calls.jsonl"
    good = b'{"query": "q", "documents": ["d"]}\n\n'
    file.write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    assert FileTexts(str(file), 1).lines == 2
    assert "calls.jsonl line 3 is left out: " in capsys.readouterr().err
    file.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises((ValueError, OSError), match=r"has no calls|is UTF-16"):
        FileTexts(str(file), 1)


def test_file_texts_take_pairs_too(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("query,document\nq,a\nq,b\nr,c\nq,d\n")
    texts = FileTexts(str(file), 1)
    assert sorted(texts.calls) == [("q", ["a", "b"], None), ("q", ["d"], None), ("r", ["c"], None)]


def test_file_texts_refuse_an_empty_file(tmp_path):
    (tmp_path / "none").write_text("\n")
    with pytest.raises(ValueError, match="has no calls: it is empty"):
        FileTexts(str(tmp_path / "none"), 1)


# --- who takes which call ---


def test_gate_opens_after_the_warm_up_and_closes_once():
    level, gate = Level("rerank", "closed", 2, 3, 4, None), Gate()
    asyncio.run(gate.start())
    taken = [gate.take(level) for _ in range(9)]
    assert taken[:3] == [(0, False), (1, False), (2, False)]
    assert taken[3:7] == [(3, True), (4, True), (5, True), (6, True)] and taken[7:] == [None, None]
    assert 0 < gate.n[OPENED] < gate.n[CLOSED] and gate.n[TAKEN] == 7
    closed = gate.n[CLOSED]
    assert gate.take(level) is None and gate.n[CLOSED] == closed


def test_open_loop_processes_share_one_schedule():
    """Every process knows the schedule; together they send each call of it once, at the time one process would."""

    def made(processes):
        level, found, gates = Level("rerank", "open", 500.0, 5, 200, None), [], []

        async def call(endpoint, body, n_docs, due=None, measured=True):
            found.append((due, measured, json.loads(body)["query"]))
            return Call(due, due, due, None, 0, n_docs, measured)

        async def main():
            gate = Gate()
            gate.processes = processes
            gates.append(gate)
            for share in range(processes):
                bench = Bench("http://127.0.0.1:1/v1", "m", Texts(1, 2))
                bench.call = call
                asyncio.get_running_loop().create_task(drive(bench, level, gate, share))
            while len(found) < 205:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)

        asyncio.run(main())
        found.sort()
        window = gates[0].n[CLOSED] - gates[0].n[OPENED]
        return [due - found[0][0] for due, *_ in found], [rest for _, *rest in found], window

    one, three = made(1), made(3)
    assert len(one[0]) == 205 and one[1] == three[1]
    assert three[0] == pytest.approx(one[0], abs=1e-6) and three[2] == pytest.approx(one[2], abs=1e-6)
    assert sum(measured for measured, _ in one[1]) == 200
