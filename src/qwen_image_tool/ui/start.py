"""What is shown while Gradio is loaded: one small page that needs nothing else to be seen."""

import html
import json
from collections.abc import Sequence

from qwen_image_tool.server.plain import plain_page
from qwen_image_tool.ui.words import Words

READY_PATH = "/page/ready"


def start_page(t: Words, ahead: Sequence[str]) -> str:
    """It waits for READY_PATH, then becomes the page. Meanwhile the browser fetches and reads the
    scripts and styles at the paths `ahead`, which it keeps."""
    said = {
        "failed": t("The page can't be loaded: {error}", error="%s"),
        "gone": t("QwenImageTool has ended. Start it again with: ./qit ui"),
    }
    body = _BODY.format(
        opening=html.escape(t("Opening the page …")),
        slow=html.escape(t("The first start after an installation takes longest.")),
        repair=html.escape(t("Run ./qit setup (Windows: qit setup), then try again.")),
        again=html.escape(t("Try again")),
        ready=READY_PATH,
        ahead=json.dumps(ahead),
        said=json.dumps(said).replace("<", "\\u003c"),
    )
    return plain_page(t.language, body, _STYLE)


_STYLE = """
.bar { width: 180px; height: 4px; border-radius: 2px; background: var(--line); overflow: hidden }
.bar i { display: block; width: 40%; height: 100%; background: var(--accent);
  animation: go 1.2s infinite ease-in-out alternate }
@keyframes go { from { transform: translateX(-60%) } to { transform: translateX(210%) } }
@media (prefers-reduced-motion: reduce) { .bar i { animation: none } }
"""
_BODY = """<main role="status"><p id="what">{opening}</p></main>
<div class="bar" id="bar"><i></i></div><p class="soft" id="slow">{slow}</p>
<p class="soft" id="repair" hidden>{repair}</p>
<button id="again" hidden onclick="location.reload()">{again}</button>
<script>
const said = {said}, at = id => document.getElementById(id);
function stop(text, repair) {{
  at('what').textContent = text;
  at('bar').hidden = at('slow').hidden = true;
  at('again').hidden = false;
  at('repair').hidden = !repair;
}}
async function wait() {{
  for (;;) {{
    const answer = await (await fetch('{ready}')).json();
    if (answer.ready) return location.reload();
    if (answer.failure) return stop(said.failed.replace('%s', answer.failure), true);
  }}
}}
function prepare(path) {{
  if (!path.endsWith('.js')) return fetch(path).catch(() => {{}});
  const link = document.createElement('link');
  document.head.append(Object.assign(link, {{rel: 'modulepreload', href: path}}));
}}
// Not before this page is painted
requestAnimationFrame(() => setTimeout(() => {ahead}.forEach(prepare), 100));
wait().catch(() => stop(said.gone, false));
</script>"""
