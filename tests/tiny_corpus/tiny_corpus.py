"""A TensorFlow Datasets builder of ten documents; test_sources.py prepares it."""

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(num_classes=2),
            "body": {"parts": tfds.features.Sequence(tfds.features.Text())},
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), license="CC0-1.0", disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(10):
            parts = [f"Part {i}.", "The next part. It goes on."]
            yield i, {"text": f"Document {i} says café. It is short.", "label": i % 2, "body": {"parts": parts}}
