"""Send requests to language models on servers that speak OpenAI's protocol, such as vLLM, llama.cpp and Ollama.

Many providers of hosted models speak this protocol, too.
"""
