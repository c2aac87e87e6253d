"""A file that is no installed module, as a user brings it: a Hugging Face BERT of a small random configuration."""

from transformers import BertConfig, BertModel


def tiny(hidden: int = 16, layers: int = 2) -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=100,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    )
