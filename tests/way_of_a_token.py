"""The way of a token: the functions that a document passes from its file to a checkpoint, in the order of their calls.

    python tests/way_of_a_token.py          # writes docs/way-of-a-token.md from a small run, watched by sys.setprofile

`WAY` names the functions and says what each does; a run decides whether it is called, and when.
"""
import sys
import tempfile
import threading
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "way-of-a-token.md"
WAY = {
    "stentor/preparing.py: _fill": "reads a source until its shards hold what is wanted",
    "stentor/sources.py: clean_documents": "a row becomes a cleaned document, or a counted reason why not",
    "stentor/sources.py: documents": "rows of the source's files, from a cursor on, tried again where the hub fails",
    "stentor/formats.py: rows_of": "rows of one file, by its format, a block at a time",
    "stentor/corpus.py: clean_text": "the card's cleaning",
    "stentor/preparing.py: _ShardWriter.add": "a megabyte of documents is gathered",
    "stentor/preparing.py: _ShardWriter.pack": "and becomes tokens and shards",
    "stentor/preparing.py: _Store.encoded": "ids with EOS after each document; validation text left out",
    "stentor/tokenizer.py: encode_documents": "by whichever tokenizer the run has",
    "tokenmonster_hf.py: Vocabulary.encode_batch": "ours: normalise, then the compiled walk",
    "stentor/preparing.py: _ShardWriter._write_shard": "a shard is full: it, what is over, and the manifest",
    "stentor/files.py: write_atomically": "there whole or not at all",
    "stentor/train.py: Run.one_step": "the loop asks for a batch",
    "stentor/engine.py: Engine.feed": "of this step",
    "stentor/tokens.py: TokenStore.batch": "a pure function of (seed, step)",
    "stentor/tokens.py: TokenStore._block": "a row of the batch",
    "stentor/learner.py: Learner.step": "one optimiser step, and the average of the weights",
    "stentor/engine.py: Engine.step": "clipping, schedule, loss scaling, skipped steps",
    "stentor/engine.py: accumulate_gradients": "forward and backward, micro-batch by micro-batch",
    "stentor/loss.py: ChunkedCrossEntropy.forward": "loss and gradient without logits in memory",
    "stentor/train.py: Run.write_checkpoint": "what the token changed",
    "stentor/checkpoints.py: save_checkpoint": "is hashed, renamed into place, and gone on from",
}


# What was called before these handled validation text, or the probe and the checkpoint before the first step.
MARKS = ("stentor/preparing.py: _fill", "stentor/train.py: Run.one_step")


def watched(work) -> list[str]:
    """The functions of the suite that `work()` calls, in the order of their first calls after each of MARKS."""
    seen, names = {}, list(WAY)

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(REPO)):
            file = Path(frame.f_code.co_filename).relative_to(REPO).as_posix()
            name = f"{file}: {frame.f_code.co_qualname}"
            if name in MARKS and name not in seen:
                for later in names[names.index(name):]:
                    seen.pop(later, None)
            seen.setdefault(name, None)
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(seen)


def small_run(folder: Path) -> None:
    from conftest import make_tiny

    import stentor_utils as su
    tiny = make_tiny(folder)
    su.train(tiny.recipe, su.TokenStore(tiny.store_dir, tiny.recipe), folder / "run", tokenizer=tiny.tokenizer,
             say=lambda text: None)


def page() -> str:
    """The page, from a run; AssertionError where a function of WAY is not called, or in another order."""
    with tempfile.TemporaryDirectory() as folder:
        called = watched(lambda: small_run(Path(folder)))
    missing = [name for name in WAY if name not in called]
    assert not missing, f"not called: {missing}"
    order = [name for name in called if name in WAY]
    assert order == list(WAY), f"called in this order: {order}"
    rows = [f"| {number} | `{name.partition(': ')[0]}` | `{name.partition(': ')[2]}` | {WAY[name]} |"
            for number, name in enumerate(order, 1)]
    return "\n".join([
        "# The way of a token", "",
        "The functions that a document passes from its file to a checkpoint, in the order in which a run calls",
        "them (`python tests/way_of_a_token.py` writes this page; a test holds it).", "",
        "| | file | function | what happens |", "|---|---|---|---|", *rows, ""])


if __name__ == "__main__":
    sys.path[:0] = [str(REPO), str(REPO / "tests")]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(REPO)}: {len(WAY)} functions")
