"""How a word's vector moves with its context: occurrences clustered, nearest ones, the static vector, a picture.

    python -m plm.senses --model=SRC --word=bank --input=FILE --output=DIR [--layer=-1 --static=glove.txt]

FILE has a sentence a line; plain, .gz or .xz. SRC: a run's workdir, with @STEP for another checkpoint than the newest,
a converted or a foreign folder. DIR gets senses.md, occurrences.csv, senses.json, senses.png and senses.svg.
"""

import sys

from absl import flags

from plm import command, host


def main() -> None:
    values = flags.FLAGS
    host.keep_memory()
    host.keep_programs()
    from plm.analysis import senses  # imports JAX: --help and bad flags answer at once
    from plm.inference.model import load

    settings = senses.Settings(
        layer=values.layer,
        most=values.most,
        clusters=values.clusters,
        neighbours=values.neighbours,
        examples=values.examples,
        projection=values.projection,
        seed=values.seed,
    )
    folder = senses.make_output(values.output)
    found = senses.analyse(load(values.model), values.word, values.input, settings, static=values.static)
    senses.write(found, folder, lambda line: print(line, file=sys.stderr, flush=True))
    print(senses.markdown(found))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "a workdir[@STEP], a converted or a foreign folder")
    flags.DEFINE_string("word", None, "the word, without case")
    flags.DEFINE_string("input", None, "the text: a sentence a line; plain, .gz, .xz")
    flags.DEFINE_string("output", None, "folder for the tables and the picture")
    flags.DEFINE_integer("layer", -1, "0 the embedding, -1 the top")
    flags.DEFINE_integer("most", 500, "occurrences that are taken, by hash if there are more")
    flags.DEFINE_integer("clusters", 0, "how many; 0 chooses by silhouette")
    flags.DEFINE_integer("neighbours", 3, "nearest occurrences of each")
    flags.DEFINE_integer("examples", 2, "occurrences of each cluster in the table")
    flags.DEFINE_enum("projection", "pca", ["pca", "tsne"], "of the picture")
    flags.DEFINE_string("static", "", "GloVe or word2vec file (text or .bin) for the static vector; needs gensim")
    flags.DEFINE_integer("seed", 0, "of k-means and t-SNE")
    command.run(main, required=("model", "word", "input", "output"))
