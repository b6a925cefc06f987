"""Chat with a ready persona through the official OpenAI SDK.

pip install openai
python examples/chat_with_openai_sdk.py pip "What are you building?"
"""

import sys

from openai import OpenAI

persona = sys.argv[1] if len(sys.argv) > 1 else "pip"
question = sys.argv[2] if len(sys.argv) > 2 else "What are you building?"

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
stream = client.chat.completions.create(
    model=persona,
    messages=[{"role": "user", "content": question}],
    max_tokens=80,
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
