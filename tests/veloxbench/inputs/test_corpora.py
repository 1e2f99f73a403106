"""Texts by name, by file and by hub id, of which what is cached is verified and the user's paths are the user's; parts
that never overlap; windows of tokens.
"""

import json
import os

import datasets.load
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from mlx_lm.utils import load_tokenizer

from veloxbench.errors import ExitCode, UnfitEnvironmentError, UsageError
from veloxbench.inputs.corpora import EVALUATION_SHARE, Text, known_corpora, load_text, token_block
from veloxbench.inputs.models import resolve_model

STORY = "".join(f"Sentence number {i} says something about the number {i * i}.\n" for i in range(500))


class Characters:
    """A tokenizer with one token per character, and optionally one at the beginning."""

    def __init__(self, bos_token_id=None):
        self.bos_token_id = bos_token_id

    def encode(self, text, *, add_special_tokens=True, verbose=True):
        first = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return [*first, *(ord(character) for character in text)]


def a_text(characters):
    return Text("story", "evaluation", (STORY[:characters],), "none", "test")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "cache"))


def test_wikitext_is_the_rows_of_the_parquet_file_joined():
    """The text that is tokenized is every row of test.parquet, in order, with nothing between."""
    text = load_text("wikitext-2")
    rows = pq.read_table(known_corpora()["wikitext-2"].files["evaluation"].path)["text"].to_pylist()
    assert len(rows) == 4358  # the data set's card
    assert text.joined == "".join(rows)
    assert text.licence.startswith("CC BY-SA")


def test_wikitext_parts_share_no_article():
    """Test evaluates, validation calibrates: no article's title line is in both."""
    titles = [
        {
            row
            for row in load_text("wikitext-2", role).documents
            if row.startswith(" = ") and not row.startswith(" = = ")
        }
        for role in ("evaluation", "calibration")
    ]
    assert min(map(len, titles)) >= 60
    assert titles[0].isdisjoint(titles[1])


def test_wikitext_in_smollm2_tokens():
    """The first 4097 tokens as one sequence, as published protocols take them, are the text's own beginning."""
    tokenizer = load_tokenizer(resolve_model("smollm2-135m").directory)
    text = load_text("wikitext-2")
    block = token_block(text, tokenizer, n_sequences=1, length=4097, contiguous=True)
    assert block.tokens.shape == (1, 4097)
    assert not block.has_bos
    assert text.joined.startswith(tokenizer.decode(block.tokens[0].tolist()))


@pytest.mark.slow
def test_gutenberg_parts_share_no_paragraph():
    """Different books: no paragraph of 200 characters or more is in both parts."""
    paragraphs = [
        {paragraph for paragraph in load_text("gutenberg", role).joined.split("\n\n") if len(paragraph) >= 200}
        for role in ("evaluation", "calibration")
    ]
    assert min(map(len, paragraphs)) > 1000
    assert paragraphs[0].isdisjoint(paragraphs[1])


def test_name_of_the_hub_configuration():
    """The name that the hub gives WikiText-2 means the pinned text."""
    assert load_text("wikitext-2-raw", "calibration") == load_text("wikitext-2", "calibration")


def test_unknown_name_lists_near_ones():
    """A typing error gets the name that was meant."""
    with pytest.raises(UsageError, match=r"'wikitext-3'; did you mean wikitext-2\?") as caught:
        load_text("wikitext-3")
    assert caught.value.exit_code == ExitCode.USAGE


def write(path, documents):
    if path.suffix.lower() == ".txt":
        path.write_text("".join(documents))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    else:
        pq.write_table(pa.table({"id": list(range(len(documents))), "text": documents}), path)
    return path


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".jsonl", ".parquet"])
def test_local_file_is_cut_in_two(tmp_path, suffix):
    """The first 80% evaluate, the rest calibrates; together they are the text, so they share nothing."""
    path = write(tmp_path / f"story{suffix}", STORY.splitlines(keepends=True))
    evaluation, calibration = load_text(str(path)), load_text(str(path), "calibration")
    assert evaluation.joined + calibration.joined == STORY
    assert abs(len(evaluation.joined) / len(STORY) - EVALUATION_SHARE) < 0.01
    assert evaluation.sha256 != calibration.sha256


@pytest.mark.usefixtures("empty_cache")
def test_documents_without_line_ends_are_kept_apart(tmp_path):
    """Rows that do not end their line are joined with a blank line, not glued word to word."""
    path = write(tmp_path / "rows.jsonl", ["one", "two", "three\n", "", "four five six seven eight"])
    assert load_text(str(path)).joined.startswith("one\n\ntwo\n\nthree\nfour ")


@pytest.mark.usefixtures("empty_cache")
def test_changed_file_is_read_again(tmp_path):
    """No cache hides an edit, not even one that keeps the file's size and time."""
    path = write(tmp_path / "story.txt", [STORY])
    before, stamp = load_text(str(path)), path.stat().st_mtime_ns
    write(path, [STORY.upper()])
    os.utime(path, ns=(stamp, stamp))
    after = load_text(str(path))
    assert after.joined == before.joined.upper()
    assert after.sha256 != before.sha256


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("story.pdf", b"x", r"suffix '\.pdf' is none of \.txt"),
        ("bad.parquet", b"not parquet", "cannot be read as parquet"),
        ("bad.jsonl", b'{"text": "a"}\n{half', "cannot be read as json"),
        ("latin.txt", "caf\u00e9".encode("latin-1") * 50, "cannot be read as text: .*utf-8"),
        ("columns.jsonl", b'{"title": "a", "body": "b"}\n', r"no column 'text'.*\['title', 'body'\]"),
        ("numbers.jsonl", b'{"n": 1}\n', "no column 'text'"),
        ("empty.txt", b"", "is empty|cannot be read"),
        ("blank.txt", b"  \n \n", "is empty"),
    ],
)
def test_file_that_is_no_text(tmp_path, name, content, sentence):
    """One sentence that names the file and what is wrong with it."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=sentence) as caught:
        load_text(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "./no/such/file", "~/missing.jsonl", "folder/missing.txt"])
def test_missing_file(name):
    """A path that is not there is called a file."""
    with pytest.raises(UsageError, match="is not a file"):
        load_text(name)


def test_hub_without_network(monkeypatch):
    """A hub id without network: one sentence that names it and what is known offline, exit code 5."""

    def unreachable(*args, **options):
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(UnfitEnvironmentError, match=r"'org/corpus'.* hub cannot be reached.*wikitext-2") as caught:
        load_text("org/corpus")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("splits", "evaluation", "calibration"),
    [
        (("train", "validation", "test"), "test", "validation"),
        (("train", "test"), "test", "train"),
        (("train", "validation"), "validation", "train"),
        (("train",), "train", "train"),
    ],
)
def test_hub_splits(monkeypatch, splits, evaluation, calibration):
    """Of a hub data set's splits two different ones are taken; a single one is cut."""
    content = DatasetDict({split: Dataset.from_dict({"text": [f"{split} {STORY}"]}) for split in splits})
    information = huggingface_hub.DatasetInfo(id="org/corpus", downloads=0, likes=0, tags=[], private=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **options: information)
    monkeypatch.setattr(datasets.load, "load_dataset", lambda *args, **options: content)
    parts = [load_text("org/corpus:config", role) for role in ("evaluation", "calibration")]
    assert parts[0].source == f"hub org/corpus ({evaluation})"
    assert parts[1].source == f"hub org/corpus ({calibration})"
    if evaluation == calibration:
        assert parts[0].joined + parts[1].joined == f"{evaluation} {STORY}"


def test_windows_are_disjoint_and_spread():
    """Four windows of 100 over 1000 tokens begin at 0, 250, 500 and 750."""
    block = token_block(a_text(1000), Characters(), n_sequences=4, length=100)
    assert block.starts == (0, 250, 500, 750)
    for row, start in zip(block.tokens, block.starts, strict=True):
        assert "".join(map(chr, row)) == STORY[start : start + 100]


def test_contiguous_windows():
    """Two windows of 100 from token 50 are the text from 50 to 250."""
    block = token_block(a_text(1000), Characters(), n_sequences=2, length=100, start=50, contiguous=True)
    assert "".join(map(chr, block.tokens.ravel())) == STORY[50:250]


def test_every_window_starts_with_bos_where_the_tokenizer_does():
    """A tokenizer that begins every text with BOS: column 0 is BOS, the other columns are text."""
    block = token_block(a_text(1000), Characters(bos_token_id=2), n_sequences=3, length=100)
    assert block.has_bos
    assert block.tokens.shape == (3, 100)
    assert (block.tokens[:, 0] == 2).all()
    assert "".join(map(chr, block.tokens[1, 1:])) == STORY[333:432]


def test_bos_that_the_tokenizer_does_not_add_is_not_added():
    """SmolLM2 has a BOS token but does not begin texts with it."""
    tokenizer = load_tokenizer(resolve_model("smollm2-135m").directory)
    assert tokenizer.bos_token_id == 1
    block = token_block(load_text("bundled"), tokenizer, n_sequences=2, length=16)
    assert not block.has_bos
    assert not (block.tokens == 1).any()


def test_token_hash_follows_tokens_and_shape():
    """The same windows have the same hash; another window, or the same tokens in another shape, another."""
    take = [
        token_block(a_text(1000), Characters(), n_sequences=n, length=length, contiguous=True).sha256
        for n, length in ((4, 100), (4, 100), (2, 200), (4, 101))
    ]
    assert take[0] == take[1]
    assert len(set(take)) == 3


def test_tokens_cannot_be_changed():
    """A block's tokens are read-only int32, as their hash says."""
    block = token_block(a_text(1000), Characters(), n_sequences=1, length=10)
    assert block.tokens.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        block.tokens[0, 0] = 1


def test_text_that_is_too_short():
    """A text shorter than the windows: what it has and what is needed."""
    with pytest.raises(UsageError, match=r"'story' \(evaluation\) has 300 tokens; 4 windows of 100 .* need 400"):
        token_block(a_text(300), Characters(), n_sequences=4, length=100)


@pytest.mark.parametrize("wrong", [{"n_sequences": 0}, {"length": 1}, {"start": -1}])
def test_impossible_windows(wrong):
    """Sizes below the least are named."""
    sizes = {"n_sequences": 1, "length": 10, "start": 0} | wrong
    name, value = next(iter(wrong.items()))
    with pytest.raises(UsageError, match=f"{name}={value}"):
        token_block(a_text(300), Characters(), **sizes)


# A user's path is the user's.


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    "name",
    ["notes[1].txt", "what?.txt", "no*tes.txt", "a::b.txt", "~x.txt", "{a,b}.txt", "file:b.txt", "hf:b.txt", "-n.txt"],
)
def test_a_file_is_read_by_its_exact_name(tmp_path, monkeypatch, name):
    """Marks of patterns, chains, homes and addresses are letters of a name; a neighbour that one would match is not."""
    write(tmp_path / "notes1.txt", ["another text " * 500])
    write(tmp_path / "whatx.txt", ["another text " * 500])
    path = write(tmp_path / name, [STORY])
    monkeypatch.chdir(tmp_path)
    for spelled in (name, str(path)):
        assert STORY.startswith(load_text(spelled).joined)


@pytest.mark.parametrize("name", ["http://localhost:9/a.txt", "file:///etc/hostname", "hf://x/y.txt", "s3://b/k.txt"])
def test_an_address_is_no_file(name):
    """Nothing is fetched from an address that stands in a file's place."""
    with pytest.raises(UsageError, match="is not a file"):
        load_text(name)


@pytest.mark.parametrize(
    ("make", "kind"), [(os.mkfifo, "a pipe"), (os.mkdir, "a directory")], ids=["pipe", "directory"]
)
@pytest.mark.parametrize("name", ["story.txt", "org/corpus"])
def test_what_is_no_file_is_named(tmp_path, monkeypatch, name, make, kind):
    """A pipe is not waited for; a folder that has a data set's name is neither read as it nor passed over."""
    (tmp_path / "org").mkdir()
    make(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"is not a file but {kind}"):
        load_text(name)


def test_a_device_is_no_text():
    """Nor does ``/dev/zero`` end the run for want of memory."""
    with pytest.raises(UsageError, match="is not a file but a device"):
        load_text("/dev/zero")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_one_sentence(tmp_path):
    """Somebody else's file."""
    path = write(tmp_path / "story.txt", [STORY])
    path.chmod(0)
    with pytest.raises(UsageError, match="Permission denied"):
        load_text(str(path))


@pytest.mark.parametrize("name", ["a" * 5000 + ".txt", "a\0.txt", "\udcff.txt", "~nosuchuser/a.txt", ""])
def test_a_name_that_no_path_can_have_is_one_sentence(name):
    """Too long, a zero byte, no UTF-8, no such user, nothing."""
    with pytest.raises(UsageError) as caught:
        load_text(name)
    assert "\n" not in str(caught.value)


UNREADABLE = {
    "empty.jsonl": (b"", "is empty"),
    "empty.parquet": (b"", "is empty"),
    "empty.json": (b"", "is empty"),
    "bytes.jsonl": (b'{"text": "abc\xff def"}\n' * 20, "utf-8"),
    "binary.txt": (b"MZ\x90\0\x03" * 300, "binary"),
    "utf16.txt": ("text " * 300).encode("utf-16"),
    "utf16.jsonl": ('{"text": "a"}\n' * 30).encode("utf-16"),
    "deep.jsonl": (b"[" * 100_000, "recursion"),
    "deep.json": (b'{"text": ' * 100_000, "recursion|line 1"),
    "huge.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", "line 1"),
    "list.jsonl": (b"[1, 2]\n[3]\n", "cannot be read as json"),
    "words.json": (b'["a", "b"]', "no JSON object"),
    "half.jsonl": ('{"text": "\\ud800 half a character"}\n' * 9).encode(),
    "magic.parquet": (b"PAR1" + bytes(300) + b"PAR1", "cannot be read as parquet"),
    "huge footer.parquet": (b"PAR1" + b"\xff" * 40 + b"\xff\xff\xff\x7fPAR1", "cannot be read as parquet"),
}


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name):
    """Empty, binary, UTF-16, too deep, too large a number, half a character, a damaged table: named, in one line."""
    content, sentence = UNREADABLE[name] if isinstance(UNREADABLE[name], tuple) else (UNREADABLE[name], "UTF-16|half a")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=sentence) as caught:
        load_text(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    """Windows editors write one; the text, and its hash, are those without it."""
    plain = write(tmp_path / f"plain{suffix}", [STORY])
    marked = tmp_path / f"marked{suffix}"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert load_text(str(marked)).sha256 == load_text(str(plain)).sha256


def test_line_ends_are_the_same_text(tmp_path):
    r"""``\r\n`` and ``\r`` are read as ``\n``."""
    write(tmp_path / "unix.txt", [STORY])
    for ends in ("\r\n", "\r"):
        (tmp_path / "other.txt").write_bytes(STORY.replace("\n", ends).encode())
        assert load_text(str(tmp_path / "other.txt")).sha256 == load_text(str(tmp_path / "unix.txt")).sha256


def test_one_very_long_line(tmp_path):
    """Ten megabytes without a line end are a text like any other."""
    text = load_text(str(write(tmp_path / "long.txt", ["word " * 2_000_000])))
    assert 0 <= len(text.joined) - EVALUATION_SHARE * 10_000_000 <= len("word ")


def test_a_file_of_a_terabyte_is_one_sentence(tmp_path):
    """A text is read whole: what does not fit is refused before it is read."""
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match=r"1099511627776 bytes, .* at most are read"):
        load_text(str(path))


def test_rows_of_other_kinds_are_no_text(tmp_path):
    """A column with one number among its strings is not the text column."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(UsageError, match="no column 'text'"):
        load_text(str(path))


def test_a_list_of_objects_is_read_like_lines(tmp_path):
    """``.json`` with one list holds the same rows as ``.jsonl``."""
    rows = [{"text": f"line {i}"} for i in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_text(str(tmp_path / "a.json")).sha256 == load_text(str(tmp_path / "a.jsonl")).sha256


def test_a_pinned_text_is_verified_each_time(tmp_path, monkeypatch):
    """Another valid Parquet file in the place of WikiText-2's is fetched anew, or refused; never read."""
    pinned = known_corpora()["wikitext-2"].files["evaluation"]
    content = pinned.path.read_bytes()
    monkeypatch.setenv("VELOXBENCH_CACHE", str(tmp_path / "cache"))
    pinned.path.parent.mkdir(parents=True)
    write(pinned.path, ["not Wikipedia at all. "] * 500)

    def fetch(pinned, downloads, reporter):
        (downloads / "fetched").write_bytes(content)
        return downloads / "fetched"

    monkeypatch.setattr("veloxbench.inputs.sources._fetch_from_hub", fetch)
    assert len(load_text("wikitext-2").documents) == 4358
    assert pinned.path.read_bytes() == content


# A tokenizer that is not the model's.


class Odd(Characters):
    """A tokenizer whose ids are whatever is given."""

    def __init__(self, ids):
        super().__init__()
        self.ids = ids

    def encode(self, text, **options):
        if isinstance(self.ids, BaseException):
            raise self.ids
        return self.ids


@pytest.mark.parametrize("token", [300, -1, 2**31, 2**40])
def test_a_token_without_an_embedding_is_refused(token):
    """MLX reads other memory for an id beyond the vocabulary: a figure of nothing."""
    with pytest.raises(UsageError, match=f"token {token}, the model knows 300: the tokenizer is another model's"):
        token_block(a_text(100), Odd([1] * 50 + [token]), n_sequences=1, length=10, vocabulary=300)
    token_block(a_text(100), Odd([1] * 50 + [299]), n_sequences=1, length=10, vocabulary=300)


@pytest.mark.parametrize("ids", [TypeError("x"), ["a"], [None], [2**70], [[1], [2, 3]], BaseException("panic")])
def test_a_tokenizer_that_fails_on_the_text_is_one_sentence(ids):
    """Whatever it raises or returns."""
    with pytest.raises(UsageError, match="the tokenizer fails on text 'story'"):
        token_block(a_text(100), Odd(ids), n_sequences=1, length=10)
