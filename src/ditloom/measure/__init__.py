"""Metrics and the evaluation of models; `METRICS` and `EXTRACTORS` list what there is without importing it."""

from ditloom.contracts.registry import Registry

METRICS = Registry("metric", "ditloom.measure")
EXTRACTORS = Registry("extractor", "ditloom.measure.extractors")
