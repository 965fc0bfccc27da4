"use strict";

// Tables: a click on a heading sorts by it, the next one the other way. What is missing stays last.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sortBy(button.parentElement));
}

function sortBy(heading) {
  const headings = [...heading.parentElement.children];
  const body = heading.closest("table").tBodies[0];
  const before = heading.getAttribute("aria-sort");
  const direction = before ? { ascending: "descending", descending: "ascending" }[before] : heading.dataset.first;
  headings.forEach((each) => each.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1;
  const valueOf = (row) => row.children[headings.indexOf(heading)].dataset.value;
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  const order = (one, other) => {
    const [a, b] = [valueOf(one), valueOf(other)];
    return a === "" || b === "" ? (a === "") - (b === "") : sign * compare(a, b);
  };
  body.append(...[...body.rows].sort(order));
}

// Answers: the queries in which two settings differ most, a few at a time.
const STEP = 6;
const section = document.getElementById("answers");
if (section) {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [list, more] = ["queries", "more"].map((id) => document.getElementById(id));
  const selects = ["first", "second"].map((id) => document.getElementById(id));
  let count = STEP;
  const show = () => {
    const chosen = selects.map((select) => Number(select.value));
    const gap = (query) => Math.abs(query.settings[chosen[0]].score - query.settings[chosen[1]].score);
    const queries = [...data.queries].sort((one, other) => gap(other) - gap(one));
    list.replaceChildren(...queries.slice(0, count).map((query) => article(data, query, chosen)));
    more.hidden = count >= queries.length;
  };
  selects.forEach((select) => select.addEventListener("change", () => ((count = STEP), show())));
  more.addEventListener("click", () => ((count += STEP), show()));
  show();
}

function make(tag, name, ...children) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children);
  return node;
}

function article(data, query, chosen) {
  const wanted = query.wanted.map((number) => content(data.documents[number], "right answer"));
  const rest = query.relevant > wanted.length ? ` and ${query.relevant - wanted.length} more` : "";
  return make(
    "article",
    "query",
    make("h3", "", query.text || `Query ${query.id}`),
    query.image ? make("p", "wanted", content(query, "what is asked", "Query")) : "",
    make("p", "wanted", query.relevant === 1 ? "Right answer:" : "Right answers:", ...wanted, rest),
    make("div", "pair", ...chosen.map((number) => side(data, query.settings[number], data.settings[number].name)))
  );
}

function side(data, found, name) {
  const documents = found.top.map(([number, score, grade], index) => {
    const right = grade > 0;
    const shown = make("div", "shown", content(data.documents[number], right ? "right answer" : "not an answer"));
    const mark = right ? make("div", "mark", `✓ right${grade > 1 ? `, grade ${grade}` : ""}`) : "";
    return make("li", right ? "right" : "", shown, `${index + 1} · ${score.toFixed(2)}`, mark);
  });
  return make("div", "", make("h4", "", `${name}: ${data.metric} ${found.score.toFixed(3)}`), make("ol", "", ...documents));
}

function content(shown, role, kind = "Document") {
  if (!shown.image) {
    const words = make("span", "", shown.text || shown.id);
    words.title = words.textContent; // Whole, where there is no room for it.
    return words;
  }
  const image = make("img");
  image.src = shown.image;
  image.alt = `${kind} ${shown.id}, ${role}`;
  image.loading = "lazy";
  return image;
}

// On paper nothing can be opened.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
