import json

import pytest

from palimpsest.generate import Sampling
from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.models.kimi_linear.generation_config import GENERATION_CONFIG, generation_config, sampling_defaults


def said(tmp_path, **content):
    (tmp_path / GENERATION_CONFIG).write_text(json.dumps(content))
    return Sampling(**sampling_defaults(tmp_path))


def test_what_is_written_is_what_is_read(tmp_path):
    assert said(tmp_path, **generation_config(KimiLinearConfig.tiny())) == Sampling(temperature=0.8, top_p=0.95)


def test_other_peoples_files(tmp_path):
    assert sampling_defaults(tmp_path) == {"temperature": 0.0}  # no file: greedy
    assert said(tmp_path, temperature=0.6) == Sampling()  # transformers samples only with do_sample
    assert said(tmp_path, do_sample=True) == Sampling(temperature=1.0)
    assert said(tmp_path, do_sample=True, top_k=0, min_p=0.1) == Sampling(temperature=1.0, min_p=0.1)
    (tmp_path / GENERATION_CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        sampling_defaults(tmp_path)
    (tmp_path / GENERATION_CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        sampling_defaults(tmp_path)
