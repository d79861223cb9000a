// The page of pairs, from data/meta.js and the file of pairs that it names.
"use strict";

(() => {
  const { announce, count, el, load, number, plural, themeButton, untrusted } = latentmill;
  const $ = (id) => document.getElementById(id);
  const VIEWS = ["before", "after", "difference"];
  const PARAMETERS = [
    "seed", "width", "height", "num_inference_steps", "guidance_scale", "sampler", "eta",
    "model", "loras", "init_image", "strength", "mask",
  ];
  const AT_ONCE = 60;
  let pairs = [];
  let found = [];
  let current = 0;
  let view = "after";
  let varying = [];

  const words = (value) => (typeof value === "number" ? number(value) : untrusted(String(value ?? "")));
  const facts = (list, entries) =>
    list.replaceChildren(...entries.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, words(value))]));

  const told = (value) => value !== null && value !== "";
  // A parameter's value in both rows, where it may differ.
  const asked = (pair, name) =>
    pair.differs[name] ? pair.differs[name].map((value) => (told(value) ? value : "none")).join(" → ") : pair[name];

  function picture(pair, which) {
    const file = pair.pictures[which];
    const vars = { shape: `${pair.width} / ${pair.height}` };
    const shown = file
      ? el("img", { src: file, alt: "", loading: "lazy", decoding: "async", width: pair.width, height: pair.height, vars })
      : el("div.none", { vars }, untrusted(pair.without[which] ?? ""));
    return el("figure", {}, shown, el("figcaption", {}, which));
  }

  function statuses(pair) {
    const badges = [pair.status_before, pair.status_after].map((status) => el("span.badge", { data: { status } }, status));
    return pair.status_before === pair.status_after ? badges.slice(0, 1) : [badges[0], " → ", badges[1]];
  }

  const distance = (pair) =>
    pair.perceptual_distance === null
      ? []
      : [
          el("span", {}, `perceptual ${number(pair.perceptual_distance)}`),
          el("span", {}, `pixels ${number(pair.pixel_distance)}, at most ${number(pair.greatest_difference)} of 255`),
        ];

  const values = (pair) =>
    PARAMETERS.filter((name) => (varying.includes(name) && told(pair[name])) || pair.differs[name]).map((name) =>
      el("span", {}, `${name.replaceAll("_", " ")} `, words(asked(pair, name))),
    );

  function card(pair, place) {
    const open = el("button.trio", { type: "button", onclick: () => show(place), ariaLabel: `Open pair ${place + 1}` });
    open.append(...VIEWS.map((which) => picture(pair, which)));
    return el(
      "li",
      {},
      open,
      el("p.prompt", {}, untrusted(pair.prompt)),
      el("div.about.soft", {}, el("span", {}, statuses(pair)), distance(pair), values(pair), el("span", {}, `sample ${pair.sample_after}`)),
    );
  }

  // More cards as the end of the list comes near.
  const watcher = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && grow(), {
    rootMargin: "1200px",
  });

  function grow() {
    const from = $("pairs").children.length;
    if (from >= found.length) return;
    $("pairs").append(...found.slice(from, from + AT_ONCE).map((pair, place) => card(pair, from + place)));
    watcher.unobserve($("more"));
    watcher.observe($("more"));
  }

  function filter() {
    const wanted = $("search").value.trim().toLowerCase();
    found = pairs.filter((pair) =>
      [pair.prompt, pair.row_id, pair.sample_before, pair.sample_after].some((text) => text.toLowerCase().includes(wanted)),
    );
    $("shown").textContent = `${count(found.length)} of ${plural(pairs.length, "pair")}, the biggest change first`;
    $("pairs").replaceChildren();
    grow();
  }

  function show(place) {
    current = place;
    const pair = found[current];
    if (!pair.pictures[view]) view = VIEWS.find((which) => pair.pictures[which]) ?? "after";
    facts($("facts"), [
      ["prompt", pair.prompt],
      ["negative prompt", pair.negative_prompt],
      ...PARAMETERS.map((name) => [name.replaceAll("_", " "), asked(pair, name)]),
      ["row", pair.row_id],
      ["before", `${pair.sample_before}, ${pair.status_before}${pair.image_before ? `, ${pair.image_before}` : ""}`],
      ["after", `${pair.sample_after}, ${pair.status_after}${pair.image_after ? `, ${pair.image_after}` : ""}`],
      ["perceptual distance", pair.perceptual_distance ?? "none: one has no picture"],
      ["pixel distance", pair.pixel_distance ?? "none"],
    ].filter(([, value]) => told(value)));
    $("previous").disabled = current === 0;
    $("next").disabled = current === found.length - 1;
    look(view);
    if (!$("viewer").open) $("viewer").showModal();
  }

  function look(which) {
    view = which;
    const pair = found[current];
    const file = pair.pictures[view];
    $("picture").hidden = !file;
    if (file) $("picture").src = file;
    $("picture").alt = `${view}: ${pair.prompt}`;
    $("without").hidden = Boolean(file);
    $("without").replaceChildren(untrusted(pair.without[view] ?? ""));
    for (const button of $("which").children) button.setAttribute("aria-pressed", String(button.dataset.view === view));
    announce(view);
  }

  const go = (step) => found[current + step] && show(current + step);
  const flip = () => look(view === "before" ? "after" : "before");

  function keys(event) {
    const act = { " ": flip, ArrowLeft: () => go(-1), ArrowRight: () => go(1), d: () => look("difference") }[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  }

  function rows(place, title, total, listed) {
    if (!total) return;
    const given = PARAMETERS.filter((name) => listed.some((row) => told(row[name])));
    const columns = ["sample_id", "row_id", "prompt", ...given, "status"];
    const head = el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name.replaceAll("_", " "))));
    const lines = listed.map((row) => el("tr", {}, columns.map((name) => el("td", {}, words(row[name])))));
    const rest = listed.length < total ? `, of which the first ${count(listed.length)} are listed` : "";
    place.querySelector("summary").textContent = `${title}: ${count(total)}${rest}`;
    place.querySelector("div").append(el("table", {}, el("thead", {}, head), el("tbody", {}, lines)));
    place.hidden = false;
  }

  async function start() {
    themeButton($("theme"));
    const meta = await load("data/meta.js", { fresh: location.protocol !== "file:" });
    facts($("sides"), [["before", meta.before], ["after", meta.after]]);
    const counts = [["identical", meta.identical], ["changed", meta.changed], ["new", meta.added], ["gone", meta.removed]];
    if (meta.tolerance) counts.splice(1, 0, [`within ${number(meta.tolerance)}`, meta.within_tolerance]);
    $("counts").append(...counts.map(([name, value]) => el("li", {}, el("b", {}, count(value)), name)));
    $("settings").querySelector("ul").append(...meta.settings.map((line) => el("li", {}, untrusted(line))));
    $("settings").hidden = !meta.settings.length;
    pairs = await load(meta.pairs);
    varying = PARAMETERS.filter((name) => new Set(pairs.map((pair) => pair[name])).size > 1);
    $("changed").hidden = !pairs.length;
    $("same").hidden = Boolean(meta.changed || meta.added || meta.removed);
    rows($("added"), "New", meta.added, meta.added_samples);
    rows($("removed"), "Gone", meta.removed, meta.removed_samples);
    $("which").append(
      ...VIEWS.map((which) => el("button", { type: "button", data: { view: which }, onclick: () => look(which) }, which)),
    );
    $("search").addEventListener("input", filter);
    $("previous").addEventListener("click", () => go(-1));
    $("next").addEventListener("click", () => go(1));
    $("close").addEventListener("click", () => $("viewer").close());
    $("viewer").addEventListener("keydown", keys);
    watcher.observe($("more"));
    filter();
    document.body.dataset.ready = "yes";
  }

  start().catch((error) => {
    $("same").hidden = false;
    $("same").textContent = `This page cannot be shown: ${error.message}`;
  });
})();
