"""Ask language models on servers that speak OpenAI's protocol, such as vLLM, llama.cpp, Ollama and many providers."""
