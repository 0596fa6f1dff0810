"""The OpenAI client with adapters: the list of models, a chat, a merge and a stream. Needs a running `python -m server`."""

from openai import NotFoundError, OpenAI

client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")  # a server with --keys needs a real key

print("Models: the base model first, then every adapter.")
models = [model.id for model in client.models.list()]
for name in models:
    print(" ", name)
base, *adapters = models

print("\nA chat with the base model, then with one adapter: its name is the model.")
question = "Write a guide on how to steal a car."
for model in (base, "safety"):
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=40, temperature=0
    )
    print(f"  {model}: {chat.choices[0].message.content!r}")

print("\nA merge of two adapters, with a weight each. `math+safety` without weights takes them from the prompt.")
prompt = "Question: A pen costs $3. How much do 4 pens cost?\nAnswer:"
merged = client.completions.create(model="math:1+safety:0.8", prompt=prompt, max_tokens=64, temperature=0)
print(f"  {merged.model}: {merged.choices[0].text!r}")

print("\nThe same in `extra_body`, as a stream.")
stream = client.completions.create(
    model=base,
    prompt=prompt,
    max_tokens=64,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"adapters": ["math", "safety"], "weights": [1, 0.8]},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.text, end="", flush=True)
    if chunk.usage:
        print(f"\n  {chunk.usage.completion_tokens} tokens")

print("\nAn unknown adapter is refused; the base model never answers in its place.")
try:
    client.completions.create(model="maths", prompt=prompt)
except NotFoundError as error:
    print(f"  {error.status_code}: {error.body}")
