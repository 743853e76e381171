"""The same mathematics in PyTorch: Transformers' BERT and OpenAI-GPT, and two towers of torch.nn.LSTM."""

import contextlib
import time

import tokenizers
import torch
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel, PreTrainedTokenizerFast

from tests.benchmarks.sizes import Size
from tests.benchmarks.texts import vocabulary


class BiLM(torch.nn.Module):
    """Two towers of projected LSTM layers over one table, which is also the softmax of both directions."""

    def __init__(self, size: Size):
        super().__init__()

        def tower():
            return torch.nn.LSTM(
                size.projection,
                size.cells,
                size.lstm_layers,
                proj_size=size.projection,
                dropout=size.dropout,
                batch_first=True,
            )

        self.table = torch.nn.Embedding(size.vocabulary, size.projection)
        self.towers = torch.nn.ModuleList([tower(), tower()])
        self.rate = size.dropout

    def forward(self, inputs, targets):
        total = 0.0
        for tower, ids, wanted in zip(self.towers, inputs, targets, strict=True):
            x = functional.dropout(self.table(ids), self.rate)
            hidden = functional.dropout(tower(x)[0], self.rate)
            logits = hidden.flatten(0, 1) @ self.table.weight.T
            total = total + functional.cross_entropy(logits.float(), wanted.flatten())
        return total / 2


def make(name: str, size: Size) -> torch.nn.Module:
    if name.startswith("bert"):
        return BertForMaskedLM(
            BertConfig(
                vocab_size=size.vocabulary,
                hidden_size=size.width,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                intermediate_size=4 * size.width,
                max_position_embeddings=size.length,
                hidden_dropout_prob=size.dropout,
                attention_probs_dropout_prob=size.dropout,
            )
        )
    if name == "gpt":
        return OpenAIGPTLMHeadModel(
            OpenAIGPTConfig(
                vocab_size=size.vocabulary,
                n_positions=size.length,
                n_embd=size.width,
                n_layer=size.layers,
                n_head=size.heads,
                resid_pdrop=size.dropout,
                embd_pdrop=size.dropout,
                attn_pdrop=size.dropout,
            )
        )
    return BiLM(size)


class Step:
    """`step()` trains once and returns the seconds that it took. "bert" scores only the masked positions, as ours
    does; "bert_all" is Transformers' own loss, which scores all of them."""

    def __init__(self, name: str, size: Size):
        self.name, self.size = name, size
        shape = (size.batch, size.length)
        self.tokens, self.targets = (torch.randint(5, size.vocabulary, shape) for _ in range(2))
        self.more_tokens, self.more_targets = (torch.randint(5, size.vocabulary, shape) for _ in range(2))
        self.model = make(name, size)
        if name.startswith("bert"):
            rows = [torch.randperm(size.length)[: size.predictions].sort().values for _ in range(size.batch)]
            self.places = torch.stack(rows)
            self.labels = torch.full(shape, -100).scatter(1, self.places, self.targets)
        self.model.train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self()

    def loss(self):
        model = self.model
        if self.name == "bert_all":
            return model(input_ids=self.tokens, labels=self.labels).loss
        if self.name == "bert":
            hidden = model.bert(input_ids=self.tokens).last_hidden_state
            index = self.places[..., None].expand(-1, -1, hidden.shape[-1])
            logits = model.cls(hidden.gather(1, index)).flatten(0, 1)
            return functional.cross_entropy(logits.float(), self.labels.gather(1, self.places).flatten())
        if self.name == "gpt":
            return model(input_ids=self.tokens, labels=self.targets).loss
        return model((self.tokens, self.more_tokens), (self.targets, self.more_targets))

    def __call__(self) -> float:
        began = time.perf_counter()
        low = self.size.dtype == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
            loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - began

    def facts(self) -> dict:
        return {"parameters": sum(p.numel() for p in self.model.parameters())}


class Embed:
    """`embed(texts)` gives the top layer's vectors of every piece and returns the seconds that it took: texts sorted by
    length, in batches of `batch` texts that are padded to their longest one."""

    def __init__(self, name: str, size: Size, batch: int):
        self.name, self.batch = name, batch
        model = make(name, size).eval()
        self.model = {"bert": lambda: model.bert, "gpt": lambda: model.transformer, "bilm": lambda: model}[name]()
        pieces = {piece: i for i, piece in enumerate(vocabulary(size))}
        backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
        backend.normalizer = tokenizers.normalizers.BertNormalizer()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")

    def _vectors(self, ids, mask):
        if self.name != "bilm":
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        forward, backward = self.model.towers
        length = mask.sum(1, keepdim=True)
        at = torch.arange(ids.shape[1])[None]
        turned = torch.where(at < length, length - 1 - at, at)
        ahead = forward(self.model.table(ids))[0]
        behind = backward(self.model.table(ids.gather(1, turned)))[0]
        behind = behind.gather(1, turned[..., None].expand(-1, -1, behind.shape[-1]))
        return torch.cat([ahead, behind], -1)

    def __call__(self, texts: list[str]) -> float:
        began = time.perf_counter()
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = [None] * len(ids)
        with torch.inference_mode():
            for first in range(0, len(order), self.batch):
                rows = order[first : first + self.batch]
                padded = self.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
                vectors = self._vectors(padded["input_ids"], padded["attention_mask"]).numpy()
                for row, index in enumerate(rows):
                    found[index] = vectors[row, : len(ids[index])].copy()
        seconds = time.perf_counter() - began
        assert all(len(one) == len(text.split()) for text, one in zip(texts, found, strict=True))
        return seconds
