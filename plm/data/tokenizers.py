"""Text -> ids and back: WordPiece, BPE with `</w>`, byte-level BPE and word vocabularies, one class for all.

The algorithms (normalisers, models, trainers) are those of the `tokenizers` library; what is here is the papers' text
cleaning (as their official code does it), the special tokens' roles and the order of a trained vocabulary.

    kind       paper  cleaning and splitting                              special tokens when trained here
    wordpiece  BERT   spaces, control characters, CJK, lower case and     [PAD] [UNK] [CLS] [SEP] [MASK]
                      accents, punctuation
    bpe        GPT    `standardize`, `english_words`, lower case          <unk> first, "\\n</w>" (end of document) last
    byte_bpe   none   none; a space before each sentence, GPT-2's         <pad> <mask> <cls> <sep> <eod>
                      pattern; for controlled comparisons
    words      ELMo   `english_words`                                     <S> </S> <UNK>

No text is read as a special token, but for a line break in GPT's (the published token is one) and a word "<S>" of text
that is split already (as in ELMo's official code).

**GPT's splitting.** The published one is spaCy's English tokenizer, which is no dependency. `english_words` follows its
main rules (contractions, abbreviations, initials, ellipses, currency and per cent signs, sentence-final stops, a full
stop between two words) in one expression. From the same words on (`encode_words`) ids are exactly the published ones.
From plain text 157 of the 159 cases (6,690 ids) of the golden file have exactly the published ids; in the other two
spaCy kept "//" together and the full stop with the lower-case initial "y.".

**BERT's cleaning** is the library's `BertNormalizer`. Over all code points it differs from google-research/bert in
these only: private-use characters are dropped (there they turn their word into [UNK]), CJK U+2B820..U+2B91F is not
isolated, U+166D is punctuation, U+1734 an accent, and about 500 marks, punctuation and format characters that are newer
than the library's Unicode tables are letters.

**Training is deterministic** although the library's trainers number the first symbols in the order of a hash table
(measured: three processes, three WordPiece and three BPE numberings of one corpus): words are counted here, once, and
given to the trainer with all first symbols numbered. Memory: the distinct words, at most `MAX_WORDS` of them (1.2 GB
measured at that limit, 190 MB for 360 MB of novels; beyond the limit the rarest are forgotten), whatever the corpus.
"""

import collections
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import ftfy
import numpy as np
import tokenizers
from absl import logging
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from plm.errors import UserError
from plm.randomness import stable_hash

KINDS = ("wordpiece", "bpe", "byte_bpe", "words")
VERSION = 1  # of the cleaning and splitting rules; a part of every fingerprint
MAX_WORDS = 5_000_000
ROW = 50  # characters (bytes and markers) of a word in ELMo
BEGIN_SENTENCE, END_SENTENCE, BEGIN_WORD, END_WORD, NO_CHARACTER = 256, 257, 258, 259, 260

SPECIALS = {
    "wordpiece": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "bpe": {"unk": "<unk>", "eod": "\n</w>"},
    "byte_bpe": {"pad": "<pad>", "mask": "<mask>", "cls": "<cls>", "sep": "<sep>", "eod": "<eod>"},
    "words": {"bos": "<S>", "eos": "</S>", "unk": "<UNK>"},
}
_LOWERCASE = {"wordpiece": True, "bpe": True, "byte_bpe": False, "words": False}


# ------------------------------------------------------------------------------------------------- words of plain text

_UNTOUCHED_BY_FTFY = re.compile(r"[\t\n -%'-~]*")  # ASCII without control characters and HTML entities
_DASHES = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
_QUOTES = ((ftfy.chardata.SINGLE_QUOTE_RE, "'"), (ftfy.chardata.DOUBLE_QUOTE_RE, '"'))  # that ftfy makes straight
_PUNCTUATION_RUN = re.compile(r"([-~!\";?+,)(/*\[\]}{|_])\1*")


def standardize(text: str) -> str:
    """GPT's cleaning: ftfy, plain dashes, spaces around runs of a punctuation mark and line breaks, single spaces."""
    if not _UNTOUCHED_BY_FTFY.fullmatch(text):
        text = ftfy.fix_text(text).translate(_DASHES)
    text = _PUNCTUATION_RUN.sub(r" \g<0> ", text)
    if "\n" in text:
        text = re.sub(r"\s*\n\s*", " \n ", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


_ABBREVIATIONS = (
    "Mr Mrs Ms Dr Prof St Jr Sr Gen Gov Sen Rep Rev Messrs Adm Bros Co co Corp Inc Ltd Ph.D vs"
    " Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec"
)
_WORD = re.compile(
    rf"""
    \n
    | (?:https?|ftp)://\S*\w | www\.\S*\w | [\w.+-]+@\w[\w-]*(?:\.\w+)+     # addresses
    | \.{{2,}} | -{{2,}}                                                    # an ellipsis, a long dash
    | (?:{"|".join(map(re.escape, _ABBREVIATIONS.split()))})\.(?!\w)
    | (?:[A-Za-z]\.){{2,}}(?!\w) | [A-Z]\.(?!\w)                            # U.S., i.e., J.
    | [A-Za-z]+?(?=n['’]t\b) | n['’]t\b                                     # do n't
    | (?i:can(?=not\b)) | (?<=(?i:can))not\b
    | ['’](?i:s|ll|re|ve|d|m)\b
    | \w+ (?: (?: ['’](?!(?i:s|ll|re|ve|d|m)\b) | [&@-] | (?<=\d)[,:.](?=\d) | (?<=[A-Z])\. | \.(?![A-Z]) ) \w+ )*
    | \S
    """,
    re.VERBOSE,
)


def english_words(text: str) -> list[str]:
    """The words and punctuation marks of plain text; a line break is a word of its own."""
    return _WORD.findall(text)


# --------------------------------------------------------------------------------------------------- ELMo's characters


def character_rows(words: Sequence[str | bytes], width: int = ROW) -> np.ndarray:
    """ELMo's raw byte ids, uint16 [n, width]: 258, at most width - 2 UTF-8 bytes, 259, and 260 up to the width.

    Bytes are 0..255; nothing is added (at inference ELMo adds 1, so that 0 means "no token").
    """
    rows = np.full((len(words), width), NO_CHARACTER, np.uint16)
    rows[:, 0] = BEGIN_WORD
    for row, word in zip(rows, words, strict=True):
        encoded = (word if isinstance(word, bytes) else word.encode("utf-8", "ignore"))[: width - 2]
        row[1 : len(encoded) + 1] = np.frombuffer(encoded, np.uint8)
        row[len(encoded) + 1] = END_WORD
    return rows


def _byte_characters() -> str:
    """The character by which byte-level BPE writes each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    written = dict(zip(printable, printable, strict=True)) | {byte: 256 + n for n, byte in enumerate(others)}
    return "".join(chr(written[byte]) for byte in range(256))


_BYTES = {character: byte for byte, character in enumerate(_byte_characters())}


# -------------------------------------------------------------------------------------------------------- the tokenizer


class Tokenizer:
    """A vocabulary and its rules.

    kind: "wordpiece" | "bpe" | "byte_bpe" | "words". size: number of ids, special tokens included.
    vocabulary: the pieces in the order of their ids. merges: of the two BPE kinds. roles: which of unk, pad, cls, sep,
    mask, bos, eos, eod (end of document) there are, and their ids. lowercase: whether text is lower-cased (WordPiece:
    accents are removed too). pretokenized: text has spaces between words already and is only split there (bpe, words).
    base, added: the entries without the added words, and these as text (`with_added`). marks: roles of tokens behind
    all others that frame a task's rows and are never read from text (`with_marks`).
    lossless: decoding gives the text back, byte for byte. continuations: bool [size], pieces that continue the word
    before them, or None where the kind cannot tell. special_ids: ids that masking never chooses.
    byte_lengths: int32 [size], bytes of text of each id (special tokens 0, eod 1) if lossless, else None.
    """

    def __init__(
        self,
        kind: str,
        vocabulary: Sequence[str],
        roles: dict[str, int],
        *,
        merges: Sequence[tuple[str, str]] = (),
        lowercase: bool | None = None,
        pretokenized: bool = False,
        added: Sequence[str] = (),
        marks: Sequence[str] = (),
    ):
        lowercase = _check(kind, lowercase, pretokenized)
        self.kind, self.lowercase, self.pretokenized = kind, lowercase, pretokenized
        self.base, self.added, self.marks = tuple(vocabulary), tuple(added), tuple(marks)
        self.merges, self._own_roles = tuple(merges), dict(roles)
        read = self.base + tuple(_entry(kind, word) for word in self.added)
        self.vocabulary = read + tuple(f"_{name}_" for name in self.marks)
        self.roles = self._own_roles | {name: len(read) + i for i, name in enumerate(self.marks)}
        self.size = len(self.vocabulary)
        ids = {piece: i for i, piece in enumerate(self.vocabulary)}
        if len(ids) != self.size:
            twice = next(piece for piece, n in collections.Counter(self.vocabulary).items() if n > 1)
            raise UserError(f"vocabulary: {twice!r} is there more than once; every entry must be there once")
        settings = (lowercase, pretokenized, sorted(self.roles.items()))
        more = [part for part in (self.added, self.marks) if part]
        parts = (self.base, map(" ".join, self.merges), *more)
        entries = (f"{stable_hash(*part, bits=128):032x}" for part in parts)
        self.fingerprint = f"{stable_hash('tokenizer', VERSION, kind, *settings, *entries, bits=128):032x}"
        self.special_ids = np.array(
            sorted(i for role, i in self.roles.items() if role not in ("mask", "unk")), dtype=np.int32
        )
        self.lossless = kind == "byte_bpe"
        specials = set(self.roles.values())
        self.byte_lengths = self.continuations = None
        if self.lossless:
            lengths = [0 if i in specials else len(piece) for i, piece in enumerate(self.vocabulary)]
            self.byte_lengths = np.array(lengths, np.int32)
            self.byte_lengths[self.roles["eod"]] = 1
        if kind == "wordpiece":
            marked = [piece.startswith("##") and len(piece) > 2 for piece in self.vocabulary]
            self.continuations = np.array(marked, bool)
        if kind == "words":
            self.continuations = np.zeros(self.size, bool)
        self.backend = self._backend({piece: ids[piece] for piece in read})

    def _backend(self, ids: dict[str, int]) -> tokenizers.Tokenizer:
        if self.kind == "wordpiece":
            unknown = self.vocabulary[self.role("unk")]
            model = models.WordPiece(
                ids, unk_token=unknown, continuing_subword_prefix="##", max_input_chars_per_word=200
            )
            backend = tokenizers.Tokenizer(model)
            backend.normalizer, backend.pre_tokenizer = _bert_rules(self.lowercase)
            backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        elif self.kind == "byte_bpe":
            # An added word has no merges: it is found whole or not at all.
            model = _bpe_model(ids, self.merges, ignore_merges=bool(self.added))
            backend = tokenizers.Tokenizer(model)
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
        elif self.kind == "bpe":
            unknown = self.vocabulary[self.role("unk")]
            ids = {piece: ids[piece] for piece in self.base}
            model = _bpe_model(ids, self.merges, unk_token=unknown, end_of_word_suffix="</w>", fuse_unk=False)
            backend = tokenizers.Tokenizer(model)
            backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
            # The library numbers them from the size of the model's vocabulary on, as they are numbered here.
            backend.add_tokens([tokenizers.AddedToken(word, single_word=True) for word in self.added])
        else:
            backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=self.vocabulary[self.role("unk")]))
            backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
        return backend

    def standalone(self) -> tokenizers.Tokenizer:
        """The library's tokenizer with all that happens to a sentence before it: for programs that have only that.

        The ids are those of `encode`, but for text of kind "bpe" that ftfy mends in other ways than by straight quotes
        and composed characters (mojibake, ligatures, HTML entities), and for a capital sigma at a word's end.
        """
        whole = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self.kind == "byte_bpe":
            whole.normalizer = normalizers.Prepend(" ")
        elif self.kind in ("bpe", "words"):
            whole.normalizer = normalizers.Sequence(_splitting(self.kind, self.lowercase, self.pretokenized))
            if self.kind == "bpe":
                whole.decoder = decoders.BPEDecoder(suffix="</w>")
        return whole

    def __reduce__(self):
        settings = (self._own_roles, self.merges, self.lowercase, self.pretokenized, self.added, self.marks)
        return _restore, (self.kind, self.base, *settings)

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.size:,} ids, {self.fingerprint[:12]})"

    def without_added(self) -> "Tokenizer":
        """The tokenizer that this one was before words and marks were added."""
        options = {"lowercase": self.lowercase, "pretokenized": self.pretokenized}
        return Tokenizer(self.kind, self.base, self._own_roles, merges=self.merges, **options)

    def with_marks(self, names: Sequence[str]) -> "Tokenizer":
        """This one with tokens of these roles behind all others: GPT's `_start_`, `_delimiter_` and `_classify_`."""
        options = {"lowercase": self.lowercase, "pretokenized": self.pretokenized, "added": self.added}
        return Tokenizer(self.kind, self.base, self._own_roles, merges=self.merges, marks=names, **options)

    def with_added(self, words: Sequence[str]) -> "Tokenizer":
        """This one with more words, each an entry of its own behind the others.

        All other text is read as before, but that WordPiece may begin a longer word with an added one, and that bpe
        also finds an added one that marks set apart inside a word ("cat.zebra"), whose rest is then read on its own.
        Lower-cased where the tokenizer does. Errors: UserError for a word that is an entry already, is there twice, or
        is several words to this tokenizer.
        """
        words = [word.lower() if self.lowercase else word for word in words]
        options = {"lowercase": self.lowercase, "pretokenized": self.pretokenized, "merges": self.merges}
        if self.marks:
            raise UserError(f"words cannot be added behind a task's tokens ({', '.join(self.marks)}): add them before")
        grown = Tokenizer(self.kind, self.base, self._own_roles, **options, added=(*self.added, *words))
        for word, ids in zip(words, grown.encode(words), strict=True):
            if len(ids) != 1 or ids[0] < self.size or word != "".join(word.split()):
                raise UserError(
                    f"added word {word!r} is no single word to a {self.kind} tokenizer, so it would never be read"
                )
        return grown

    def role(self, name: str) -> int:
        """The id of the special token of that role; UserError where the tokenizer has none."""
        if name not in self.roles:
            have = ", ".join(self.roles)
            raise UserError(f"a tokenizer of kind {self.kind!r} has no {name!r} token (it has: {have})")
        return self.roles[name]

    def _prepare(self, sentence: str) -> str:
        """What the library gets: cleaned text, for bpe and words with one space between words."""
        if self.kind == "byte_bpe":
            return " " + sentence
        if self.kind == "wordpiece":
            return sentence
        words = _split(self.kind, sentence, self.pretokenized)
        return " ".join(words).lower() if self.lowercase else " ".join(words)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Ids of each sentence, without special tokens; what the vocabulary does not hold becomes unk."""
        return self._encode([self._prepare(sentence) for sentence in sentences])

    def encode_open(self, sentences: Sequence[str]) -> tuple[list[list[int]], list[str]]:
        """Like `encode`, but an unknown word of kind "words" gets id size + k; also the list that k indexes.

        The list holds every unknown word once, in the order of first occurrence.
        """
        texts = [self._prepare(sentence) for sentence in sentences]
        encoded = self._encode(texts)
        if self.kind != "words":
            return encoded, []
        unknown, open_ids = self.role("unk"), {}
        for text, ids in zip(texts, encoded, strict=True):
            if unknown in ids:
                for i, word in enumerate(filter(None, text.split(" "))):
                    if ids[i] == unknown and word != self.vocabulary[unknown]:
                        ids[i] = self.size + open_ids.setdefault(word, len(open_ids))
        return encoded, list(open_ids)

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[list[int]]:
        """Ids of sentences that are split into words already, by spaCy for example; no cleaning but lower case.

        A GPT word that is a line break with blanks around it becomes "\\n</w>", as in the published code.
        """
        if self.kind in ("wordpiece", "byte_bpe"):
            return self.encode([" ".join(words) for words in sentences])
        texts = [" ".join("\n" if word.strip(" ") == "\n" else word for word in words) for words in sentences]
        return self._encode([text.lower() if self.lowercase else text for text in texts])

    def target_id(self, ids: np.ndarray) -> np.ndarray:
        """Ids of the closed vocabulary: open ids (>= size, kind "words" only) become unk."""
        ids = np.asarray(ids)
        if self.kind != "words":
            return ids
        return np.where(ids >= self.size, ids.dtype.type(self.role("unk")), ids)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary entries, with their ## or </w> or byte-level spelling; open ids are the unknown word."""
        return [self.vocabulary[i] for i in self.target_id(np.fromiter(ids, np.int64)).tolist()]

    def decode(self, ids: Iterable[int]) -> str:
        """Text: exact if lossless (sentences joined by a space, documents by a line break), else words and spaces."""
        ids = self.target_id(np.fromiter(ids, np.int64)).tolist()
        if self.kind == "bpe":
            return "".join(self.vocabulary[i] for i in ids).replace("</w>", " ").removesuffix(" ")
        if not self.lossless:
            return self.backend.decode(ids, skip_special_tokens=False)
        documents: list[list[int]] = [[]]
        for i in ids:
            if i == self.roles["eod"]:
                documents.append([])
            else:
                documents[-1].append(i)
        texts = (self.backend.decode(document, skip_special_tokens=False) for document in documents)
        return "\n".join(text.removeprefix(" ") for text in texts)

    def character_rows(self, words: Sequence[str] | None = None) -> np.ndarray:
        """ELMo's raw byte ids (0..260, nothing added), uint16 [n, 50], of words, or of every id of the vocabulary.

        A piece is spelled by its own bytes, without ## and </w>; a byte-level piece by its bytes, the space included;
        the sentence markers as 256 and 257; every other special token literally.
        """
        if words is not None:
            return character_rows(words)
        specials = set(self.roles.values())
        rows = character_rows([self._spelling(p, i in specials) for i, p in enumerate(self.vocabulary)])
        for role, marker in (("bos", BEGIN_SENTENCE), ("eos", END_SENTENCE)):
            if role in self.roles:
                rows[self.roles[role], :3] = BEGIN_WORD, marker, END_WORD
                rows[self.roles[role], 3:] = NO_CHARACTER
        return rows

    def _spelling(self, piece: str, special: bool) -> str | bytes:
        if self.kind == "bpe":
            return piece.removesuffix("</w>")
        if special:
            return piece
        if self.kind == "wordpiece":
            return piece.removeprefix("##") or piece
        if self.kind == "byte_bpe":
            return bytes(_BYTES[character] for character in piece)
        return piece

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.json` (the library's own format) and `tokenizer_settings.json`; each is replaced whole."""
        directory = epath.Path(directory)
        settings = {
            "version": VERSION,
            "kind": self.kind,
            "size": self.size,
            "lowercase": self.lowercase,
            "pretokenized": self.pretokenized,
            "roles": self._own_roles,
            "added": self.added,
            "marks": self.marks,
            "fingerprint": self.fingerprint,
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, text in (
                ("tokenizer.json", self.backend.to_str(pretty=True)),
                ("tokenizer_settings.json", json.dumps(settings, indent=1) + "\n"),
            ):
                temporary = directory / f".{name}.{os.getpid()}"
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(directory / name)
        except OSError as error:
            raise UserError(f"{directory}: the tokenizer cannot be written ({error})") from None

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Tokenizer":
        """The tokenizer that `save` wrote there."""
        directory = epath.Path(directory)
        try:
            settings = json.loads((directory / "tokenizer_settings.json").read_text(encoding="utf-8"))
            model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            added, marks = settings.get("added", ()), settings.get("marks", ())
            n_base = settings["size"] - len(added) - len(marks)
            vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)[:n_base]
            merges = [tuple(pair) for pair in model.get("merges", ())]
            version, fingerprint = settings["version"], settings["fingerprint"]
            tokenizer = cls(
                settings["kind"],
                vocabulary,
                settings["roles"],
                merges=merges,
                lowercase=settings["lowercase"],
                pretokenized=settings["pretokenized"],
                added=added,
                marks=marks,
            )
        except OSError:
            raise UserError(
                f"{directory}: no tokenizer there; a directory written by python -m plm.tokenizer or a run is right"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directory}: the saved tokenizer cannot be read ({error!r})") from None
        except UserError as error:
            raise UserError(f"{directory / 'tokenizer.json'}: {error}") from None
        if version != VERSION:
            raise UserError(f"{directory}: saved under version {version} of the splitting rules; this is {VERSION}")
        if tokenizer.fingerprint != fingerprint:
            raise UserError(f"{directory}: tokenizer.json is not the one that tokenizer_settings.json was written for")
        return tokenizer

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Tokenizer":
        """What `save` wrote there, else published vocabulary files."""
        saved = (epath.Path(path) / "tokenizer_settings.json").exists()
        return cls.load(path) if saved else cls.from_official(path)

    @classmethod
    def from_official(cls, path: str | os.PathLike, *, lowercase: bool | None = None) -> "Tokenizer":
        """From published vocabulary files: BERT's vocab.txt, GPT's encoder JSON and merges, or ELMo's word list.

        path: the vocabulary file or its directory; GPT's merges are found beside the JSON. lowercase: None asks the
        kind's default; for BERT, whether the vocabulary has capital letters. ELMo's text must be split already.
        """
        path = epath.Path(path)
        if path.is_dir():
            names = ("vocab.txt", "encoder_bpe_40000.json", "vocab.json")
            found = next((path / name for name in names if (path / name).exists()), None)
            if found is None:
                raise UserError(f"{path}: no vocabulary there; one of {', '.join(names)} would be right")
            path = found
        try:
            # A byte order mark would be a part of the first entry.
            text = path.read_text(encoding="utf-8").removeprefix("\ufeff")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a readable vocabulary file ({error})") from None
        if path.suffix == ".json":
            return _official_bpe(path, text, lowercase)
        # Only "\n" ends an entry: vocabularies hold other characters that Python calls line breaks.
        entries = [line.strip("\r") for line in text.split("\n")]
        while entries and not entries[-1]:
            entries.pop()
        for kind in ("wordpiece", "words"):
            specials = SPECIALS[kind]
            if specials["unk"] in entries:
                break
        else:
            raise UserError(f"{path}: neither [UNK] (BERT) nor <UNK> (ELMo) is an entry; a vocabulary has one a line")
        if kind == "words":
            entries = [entry for entry in entries if entry != "!!!MAXTERMID"]  # a remark in published files
        roles = {role: entries.index(token) for role, token in specials.items() if token in entries}
        if kind == "wordpiece" and lowercase is None:
            lowercase = not any(e != e.lower() for e in entries if not (e.startswith("[") and e.endswith("]")))
        return cls(kind, entries, roles, lowercase=lowercase, pretokenized=kind == "words")


def _restore(kind, vocabulary, roles, merges, lowercase, pretokenized, added, marks) -> Tokenizer:
    options = {"lowercase": lowercase, "pretokenized": pretokenized, "added": added, "marks": marks}
    return Tokenizer(kind, vocabulary, roles, merges=merges, **options)


def _bpe_model(ids: dict[str, int], merges: Sequence[tuple[str, str]], **options) -> models.BPE:
    """The library's model; its own error for merges that do not fit is a bare Exception without the merge."""
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise UserError(
                f"merge {' '.join(pair)!r} does not fit the vocabulary: two of its entries, with a space between them,"
                " that together are a third one would be right"
            )
    return models.BPE(ids, list(merges), **options)


def _entry(kind: str, word: str) -> str:
    """How the vocabulary writes a whole word."""
    if kind == "byte_bpe":
        characters = _byte_characters()
        return "".join(characters[byte] for byte in f" {word}".encode())
    return f"{word}</w>" if kind == "bpe" else word


def _official_bpe(path: epath.Path, text: str, lowercase: bool | None) -> Tokenizer:
    beside = [path.parent / name for name in ("vocab_40000.bpe", "merges.txt")]
    merges_path = next((one for one in beside if one.exists()), None)
    if merges_path is None:
        raise UserError(f"{path}: no merges beside it; {' or '.join(one.name for one in beside)} would be right")
    try:
        ids = json.loads(text)
        vocabulary = sorted(ids, key=ids.__getitem__)
        if [ids[piece] for piece in vocabulary] != list(range(len(ids))):
            raise ValueError("ids are not 0, 1, 2, ...")
        # Lines end in "\n" only, and the last one too; the first is a remark.
        merges = [tuple(line.split(" ")) for line in merges_path.read_text(encoding="utf-8").split("\n")[1:] if line]
        roles = {role: ids[token] for role, token in SPECIALS["bpe"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not GPT's encoder (piece -> id, with <unk> and \\n</w>): {error!r}") from None
    try:
        return Tokenizer("bpe", vocabulary, roles, merges=merges, lowercase=lowercase)
    except UserError as error:
        raise UserError(f"{merges_path}: {error}") from None


# ------------------------------------------------------------------------------------------------------------ training


def train(
    kind: str,
    texts: Iterable[str],
    size: int,
    *,
    lowercase: bool | None = None,
    pretokenized: bool = False,
    min_frequency: int = 2,
) -> Tokenizer:
    """A vocabulary of `size` ids, special tokens included, from sentences; the same in every process.

    lowercase: None is the paper's choice (wordpiece and bpe yes, words and byte_bpe no). pretokenized: split at spaces
    only (bpe, words). min_frequency: how often a pair must occur to be merged; words are taken however rare.
    A corpus that does not hold enough words or pairs gives a smaller vocabulary, and a warning says so.
    WordPiece and BPE number first the special tokens, then single characters (both alone and as ##x or x</w>; the most
    frequent ones, at most a sixteenth of the vocabulary but at least 200 entries), then merges in order. Words of
    other characters are not learned from; WordPiece makes them [UNK].
    Raises UserError for a corpus without text and a size that does not hold the first symbols.
    """
    lowercase = _check(kind, lowercase, pretokenized)
    words = _count_words(kind, texts, lowercase, pretokenized)
    if not words:
        raise UserError(f"no {kind} vocabulary can be trained: the corpus holds no text")
    specials = SPECIALS[kind]
    first = [token for role, token in specials.items() if not (kind == "bpe" and role == "eod")]
    last = [specials["eod"]] if kind == "bpe" else []
    if kind == "words":
        ranked = sorted(words.items(), key=lambda item: (-item[1], item[0]))
        vocabulary = first + [word for word, _ in ranked if word not in first][: max(0, size - len(first))]
        merges: list[tuple[str, str]] = []
        smallest = len(first) + 1
    else:
        alphabet = list(_BYTES) if kind == "byte_bpe" else _alphabet(words, size)
        if kind == "wordpiece":
            symbols = alphabet + ["##" + character for character in alphabet]
        elif kind == "bpe":
            symbols = alphabet + [character + "</w>" for character in alphabet]
        else:
            symbols = alphabet
        smallest = len(first) + len(symbols) + len(last)
        if size >= smallest:
            vocabulary, merges = _merge(kind, words, set(alphabet), first + symbols, size - len(last), min_frequency)
            vocabulary += last
    if size < smallest:
        raise UserError(f"vocabulary size {size} is too small: kind {kind!r} needs {smallest} for this corpus at least")
    if len(vocabulary) < size:
        what = "words" if kind == "words" else f"pairs that occur {min_frequency} times"
        logging.warning("the corpus allows a vocabulary of %d, not %d: it has no more %s", len(vocabulary), size, what)
    roles = {role: vocabulary.index(token) for role, token in specials.items()}
    return Tokenizer(kind, vocabulary, roles, merges=merges, lowercase=lowercase, pretokenized=pretokenized)


def _check(kind: str, lowercase: bool | None, pretokenized: bool) -> bool:
    """The value of `lowercase`, after refusing what a kind cannot do."""
    if kind not in KINDS:
        raise UserError(f"tokenizer kind {kind!r} is not known; one of {', '.join(KINDS)} would be right")
    if lowercase is None:
        return _LOWERCASE[kind]
    if lowercase and kind == "byte_bpe":
        raise UserError("tokenizer kind 'byte_bpe' gives text back exactly, so lowercase=True is impossible")
    if pretokenized and kind not in ("bpe", "words"):
        raise UserError(f"tokenizer kind {kind!r} splits words itself, so pretokenized=True is impossible")
    return lowercase


def _bert_rules(lowercase: bool):
    normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase
    )
    return normalizer, pre_tokenizers.BertPreTokenizer()


def _split(kind: str, text: str, pretokenized: bool) -> list[str]:
    """Words of the kinds bpe and words, not yet lower-cased."""
    if pretokenized:
        return text.split()
    return english_words(standardize(text) if kind == "bpe" else text)


def _splitting(kind: str, lowercase: bool, pretokenized: bool) -> list[normalizers.Normalizer]:
    """`_split` and lower case as steps of the library, which end in words with spaces between them.

    Oniguruma reads the same expressions. `(...)\\K` matches the empty place behind: a space is put there. An
    empty match at the very beginning, which makes the library panic, is impossible here.
    """
    space = r"\s+" if pretokenized else r"[^\S\n]+"
    if kind == "bpe" and not pretokenized:
        run = _PUNCTUATION_RUN.pattern
        marks = run[1 : run.rindex("]") + 1]
        rules = [(quotes.pattern, plain) for quotes, plain in _QUOTES]
        rules += [(re.escape(chr(dash)), plain) for dash, plain in _DASHES.items()]
        rules += [(rf"{run}\K", " "), (rf"(?<=[^{marks[1:]})(?={marks})", " "), (r"\s*\n\s*", " \n "), (space, " ")]
        before: list[normalizers.Normalizer] = [normalizers.NFC()]
        after: list[normalizers.Normalizer] = [normalizers.Strip()]
    else:
        rules, before, after = [(space, " ")], [], []
    if not pretokenized:
        after.append(normalizers.Replace(tokenizers.Regex(rf"(?x)(?:{_WORD.pattern})\K"), " "))
    if lowercase:
        after.append(normalizers.Lowercase())
    return [*before, *(normalizers.Replace(tokenizers.Regex(rule), text) for rule, text in rules), *after]


def _count_words(kind: str, texts: Iterable[str], lowercase: bool, pretokenized: bool) -> dict[str, int]:
    """word -> count, as the model sees words.

    Counting what stands between spaces and splitting each distinct one once is many times faster than splitting the
    text, and the same: no rule looks across a space, but ftfy (on mojibake that contains one, and HTML entities stay
    in text that has a "<" anywhere) and byte_bpe's, to which the spaces of a run but the last are a word of their own;
    such words are not counted.
    """
    chunks: collections.Counter[str] = collections.Counter()
    for text in texts:
        chunks.update(text.split())
        if len(chunks) > MAX_WORDS:
            floor = 0
            while len(chunks) > MAX_WORDS // 2:
                floor += 1
                chunks = collections.Counter({chunk: n for chunk, n in chunks.items() if n > floor})
    if kind == "wordpiece":
        normalizer, pre_tokenizer = _bert_rules(lowercase)

        def words_of(chunk: str) -> Iterable[str]:
            return (word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(chunk)))

    elif kind == "byte_bpe":
        pattern = pre_tokenizers.ByteLevel(add_prefix_space=False)

        def words_of(chunk: str) -> Iterable[str]:
            return (word for word, _ in pattern.pre_tokenize_str(" " + chunk))

    else:

        def words_of(chunk: str) -> Iterable[str]:
            words = _split(kind, chunk, pretokenized)
            return (word.lower() for word in words) if lowercase else words

    counts: collections.Counter[str] = collections.Counter()
    for chunk, n in chunks.items():
        for word in words_of(chunk):
            counts[word] += n
    return counts


def _alphabet(words: dict[str, int], size: int) -> list[str]:
    """The most frequent characters, sorted by code point."""
    counts: collections.Counter[str] = collections.Counter()
    for word, n in words.items():
        for character in word:
            counts[character] += n
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(ranked[: min(max(size // 32, 100), 1000)])


def _merge(kind, words, alphabet, symbols, size, min_frequency) -> tuple[list[str], list[tuple[str, str]]]:
    """The trained vocabulary in the order of ids, and the merges (empty for wordpiece)."""
    kwargs = {"vocab_size": size, "min_frequency": min_frequency, "special_tokens": symbols, "show_progress": False}
    if kind == "wordpiece":
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(continuing_subword_prefix="##", **kwargs)
    else:
        suffix = {"end_of_word_suffix": "</w>"} if kind == "bpe" else {}
        backend = tokenizers.Tokenizer(models.BPE(**suffix))
        trainer = trainers.BpeTrainer(**suffix, **kwargs)
    # The trainer counts words itself, so each is given as often as it occurred, in strings of a few kilobytes.
    backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")

    def feed() -> Iterator[str]:
        held, length = [], 0
        for word in sorted(words):
            if len(word) > 200 or not alphabet.issuperset(word):
                continue
            left = words[word]
            while left:
                n = min(left, 1 + (8192 - length) // (len(word) + 1))
                held.append(" ".join([word] * n))
                length, left = length + n * (len(word) + 1), left - n
                if length >= 8192:
                    yield " ".join(held)
                    held, length = [], 0
        yield " ".join(held)

    backend.train_from_iterator(feed(), trainer)
    model = json.loads(backend.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return vocabulary, [tuple(pair) for pair in model.get("merges", ())]
