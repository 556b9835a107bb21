"""Other ways to shorten a KV cache, at the same slots, on the same documents and questions: presses of kvpress.

It runs in an environment of its own: kvpress 0.5.5 takes transformers below 5.3, hf_crouter above. So nothing here
imports hf_crouter, nor a module of `eval` that does.
"""
