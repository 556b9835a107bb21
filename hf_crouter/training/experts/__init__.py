"""Experts: trained for a domain, calibrated on documents kept out, added to a set."""

from ...data.tokens import join, select
from .arguments import ExpertArguments
from .domain import Domain, cut, cut_by_length, host_batch, host_tokens, load_tokens, read_domain
from .evaluate import RoutedDomain, route_domains
from .lora import HostLoss, fit_adapter, lora, save_adapter
from .measure import chunk_latents, host_nll, measure_cross_scores, measured_expert
from .models import ExpertModels, check_name, expert_config, load_models, matching_set
from .train import train_expert

__all__ = [
    "Domain",
    "ExpertArguments",
    "ExpertModels",
    "HostLoss",
    "RoutedDomain",
    "check_name",
    "chunk_latents",
    "cut",
    "cut_by_length",
    "expert_config",
    "fit_adapter",
    "host_batch",
    "host_nll",
    "host_tokens",
    "join",
    "load_models",
    "load_tokens",
    "lora",
    "matching_set",
    "measure_cross_scores",
    "measured_expert",
    "read_domain",
    "route_domains",
    "save_adapter",
    "select",
    "train_expert",
]
