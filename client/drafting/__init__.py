"""Run-ahead speculation: tokens that will probably be asked for are sent before they are.

transformers' loop asks for one token after another and knows nothing of this. What it is given is always what it would
have got without (``runahead.py``), so greedy decoding, sampling and any logits processor give the same tokens; only
when it is given them is a matter of luck, which drafters try (``ngram.py``, ``model.py``) and a policy measures.
"""
