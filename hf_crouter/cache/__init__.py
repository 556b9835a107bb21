"""The compressed cache: what stands in its slots, which chunks when, prefill and capacity."""
