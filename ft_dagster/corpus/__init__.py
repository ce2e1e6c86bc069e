"""Reading report files into chapters and sections: cleaning, merging, and accounting for every byte."""

from ft_dagster.corpus.files import CorpusError, load_text_files
from ft_dagster.corpus.report_json import load_json_files

__all__ = ["CorpusError", "load_json_files", "load_text_files"]
