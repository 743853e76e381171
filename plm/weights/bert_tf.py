"""BERT as Google published it: `bert_config.json`, `vocab.txt`, `bert_model.ckpt.index` + `.data-00000-of-00001`.

Names are those of `plm.weights.bert`. What the optimizer kept beside each variable is not read.

**GELU.** `hidden_act: gelu` is whatever the program computes, and google-research/bert changed it: the exact form (erf)
up to 2019-02-07, the tanh form since. It is read as the tanh form, what that program computes from these files today.
The files of 2018 (BERT-Base and -Large as in the paper) were trained with the exact one, as which Transformers read all
of them; the two differ by up to 4.7e-4 in an activation. Write `"hidden_act": "gelu_erf"` into bert_config.json for it.
"""

import re

from etils import epath

from plm import weights
from plm.errors import UserError
from plm.weights import bert, huggingface, tensor_bundle

CONFIG = "bert_config.json"
ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_erf": "gelu", "relu": "relu", "tanh": "tanh"}
SLOTS = r"global_step|.*/(adam_[mv]|AdamWeightDecayOptimizer(_1)?|lamb_[mv]|LAMB(_1)?)"
REMARK = (
    "hidden_act 'gelu' is the tanh form, as google-research/bert computes it since 2019-02-07; for weights of 2018,"
    ' trained with the erf form as Hugging Face\'s copies are, write "hidden_act": "gelu_erf" into bert_config.json'
)


def recognises(directory: epath.Path) -> bool:
    return (directory / CONFIG).exists() and any(directory.glob("*.index"))


def read(directory: epath.Path, *, allow_missing: str = "", vocabulary: str = "") -> weights.Foreign:
    """See `plm.weights.read`; also refuses checksums that are wrong and a folder with several checkpoints."""
    directory = epath.Path(directory)
    path = directory / CONFIG
    values = weights.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is no config: it must hold one JSON object")
    model = bert.model_settings(values, path, ACTIVATIONS)
    indices = sorted(directory.glob("*.index"))
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise UserError(f"{directory} holds several checkpoints ({names}): leave the one that is meant")
    slots = re.compile(SLOTS)
    arrays = tensor_bundle.read(
        directory / indices[0].name.removesuffix(".index"), lambda name: not slots.fullmatch(name)
    )
    return bert.foreign(
        "bert_tf",
        directory,
        model,
        huggingface.vocabulary_size(values, path),
        arrays,
        bert.TENSORFLOW,
        huggingface.bert_tokenizer(directory, vocabulary),
        allow_missing=allow_missing,
        remarks=[REMARK] if values.get("hidden_act", "gelu") == "gelu" else [],
    )
