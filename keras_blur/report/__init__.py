"""Reports: learning curves, comparisons, genomes, spectra, decision regions."""

from keras_blur.report.baselines import OPTIMIZERS
from keras_blur.report.comparison import compare
from keras_blur.report.curves import format_compare, plot_compare
from keras_blur.report.decisions import draw_decisions, trace_decisions
from keras_blur.report.episodes import adaptation_curve, memorization_gap, score_episodes
from keras_blur.report.evaluation import evaluate
from keras_blur.report.genome import draw_genome
from keras_blur.report.learning import plot_fits
from keras_blur.report.synapses import draw_synapses, trace_synapses

__all__ = [
    "OPTIMIZERS",
    "adaptation_curve",
    "compare",
    "draw_decisions",
    "draw_genome",
    "draw_synapses",
    "evaluate",
    "format_compare",
    "memorization_gap",
    "plot_compare",
    "plot_fits",
    "score_episodes",
    "trace_decisions",
    "trace_synapses",
]
