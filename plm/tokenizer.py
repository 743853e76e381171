"""Trains a vocabulary.

python -m plm.tokenizer --kind=bpe --vocab=8192 --source=SPEC --output=DIR [--lowercase --pretokenized ...]

Kinds: wordpiece (BERT), bpe (GPT), byte_bpe (no unknown token), words (ELMo). Use the result with
--config.data.tokenizer.kind=KIND --config.data.tokenizer.path=DIR.
"""

from collections.abc import Iterator

from absl import flags

from plm import command
from plm.data import sources, store, tokenizers
from plm.errors import UserError


def main() -> None:
    given = flags.FLAGS
    if not 0 <= given.valid_fraction < 1:
        raise UserError(f"--valid_fraction={given.valid_fraction} must be at least 0 and below 1")
    source = sources.parse(given.source, invalid_utf8=given.invalid_utf8)
    shards = source.shards()
    bar = store.Progress("reading", sum(shard.bytes for shard in shards), unit="B", enabled=True)
    read = {"documents": 0, "sentences": 0, "bytes": 0}

    def sentences() -> Iterator[str]:
        for shard in shards:
            for document in shard.documents():
                size = sum(len(sentence.encode()) + 1 for sentence in document.sentences)
                bar.add(size)
                if sources.split_of(document, given.valid_fraction) == "train":
                    read["documents"] += 1
                    read["sentences"] += len(document.sentences)
                    read["bytes"] += size
                    yield from document.sentences

    tokenizer = tokenizers.train(
        given.kind,
        sentences(),
        given.vocab,
        lowercase=given.lowercase,
        pretokenized=given.pretokenized,
        min_frequency=given.min_frequency,
    )
    bar.close()
    tokenizer.save(given.output)
    if source.replaced:
        print(f"replaced {source.replaced:,} invalid UTF-8 sequences")
    print(
        f"{given.output}: {given.kind} vocabulary of {tokenizer.size:,} ids from {read['documents']:,} documents,"
        f" {read['sentences']:,} sentences, {read['bytes']:,} bytes; fingerprint {tokenizer.fingerprint}"
    )


if __name__ == "__main__":
    flags.DEFINE_enum("kind", None, tokenizers.KINDS, "kind of vocabulary")
    flags.DEFINE_integer("vocab", None, "number of ids, special tokens included", lower_bound=1)
    flags.DEFINE_string("source", None, f"corpus: {sources.SPECS}; several joined by +, with weights if you like")
    flags.DEFINE_string("output", None, "folder to write the tokenizer to")
    flags.DEFINE_boolean("lowercase", None, "lower-case the text; not given: the paper's choice (wordpiece, bpe: yes)")
    flags.DEFINE_boolean("pretokenized", False, "the text has spaces between words already (bpe, words)")
    flags.DEFINE_integer("min_frequency", 2, "merge only pairs that occur this often", lower_bound=1)
    flags.DEFINE_float("valid_fraction", 0.05, "documents that training holds out are held out of the vocabulary too")
    flags.DEFINE_enum("invalid_utf8", "error", ["error", "replace"], "what to do with invalid UTF-8")
    command.run(main, required=("kind", "vocab", "source", "output"))
