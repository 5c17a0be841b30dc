from llama_jax.cli import main

main()
