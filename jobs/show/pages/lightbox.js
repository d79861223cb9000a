// One picture with all that is known of it, and the command that makes it again.
"use strict";

{
  const { copy, el, load, untrusted } = latentmill;
  const PICTURE = /^images\/\d{5,}\/[0-9a-z-]+\/\d{8,}\.png$/;
  const REQUEST = ["prompt", "negative_prompt", "seed", "width", "height", "num_inference_steps", "guidance_scale", "sampler", "eta"];
  const FIRST = ["status", "error", ...REQUEST];
  const HIDDEN = 2;
  const UNREADABLE = 3;

  latentmill.Lightbox = class {
    // `gallery` has meta, rows, and what tiles say of a row.
    constructor(dialog, gallery) {
      this.dialog = dialog;
      this.gallery = gallery;
      this.details = new Map();
      this.picture = dialog.querySelector(".picture");
      this.panel = dialog.querySelector(".panel");
      dialog.querySelector("[data-do=close]").addEventListener("click", () => dialog.close());
      dialog.querySelector("[data-do=previous]").addEventListener("click", () => this.#step(-1));
      dialog.querySelector("[data-do=next]").addEventListener("click", () => this.#step(1));
      // of the document: a button that was pressed may be gone, and with it the focus
      document.addEventListener("keydown", (event) => dialog.open && this.#key(event));
      dialog.addEventListener("close", () => this.onclose?.(this.order[this.at]));
      this.picture.addEventListener("click", (event) => event.target === this.picture && dialog.close());
    }

    // `order` is what the arrows go through, `row` the one to begin with.
    open(order, row) {
      this.order = order;
      this.at = order.indexOf(row);
      this.#show();
      if (!this.dialog.open) this.dialog.showModal();
    }

    #key(event) {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.#step(steps[event.key]);
    }

    #step(by) {
      this.at = Math.min(this.order.length - 1, Math.max(0, this.at + by));
      this.#show();
    }

    async #show() {
      const row = this.order[this.at];
      const { dialog } = this;
      const seen = this.gallery.describe(row);
      dialog.setAttribute("aria-label", seen.label);
      dialog.querySelector(".position").textContent = `${latentmill.count(this.at + 1)} of ${latentmill.count(this.order.length)}`;
      dialog.querySelector("[data-do=previous]").disabled = this.at === 0;
      dialog.querySelector("[data-do=next]").disabled = this.at === this.order.length - 1;
      this.#showPicture(row, seen, null);
      this.#showFacts(row, seen, null);
      this.panel.scrollTo(0, 0);
      try {
        const details = await this.#detailsOf(row);
        if (this.order[this.at] !== row) return; // one went on meanwhile
        this.#showPicture(row, seen, details);
        this.#showFacts(row, seen, details);
        this.#prepare(this.order[this.at + 1]);
      } catch (error) {
        this.panel.append(el("p.notice", { data: { status: "failed" } }, `${error.message}; write the report again`));
      }
    }

    // The values of the files of details for one row, by name.
    async #detailsOf(row) {
      const { place, from } = this.gallery.detailsPlace(row);
      if (!this.details.has(place)) {
        const value = await load(place);
        const n = Math.max(...value.columns.map((column) => (Array.isArray(column.codes ?? column.numbers) ? (column.codes ?? column.numbers).length : 1)), from + 1);
        this.details.set(place, value.columns.map((column) => new latentmill.Column(column.name, [{ column, from: 0, n }], n)));
      }
      return new Map(this.details.get(place).map((column) => [column.name, column.value(from)]));
    }

    async #prepare(row) {
      if (row === undefined || this.gallery.rows.pictures[row] !== 1) return;
      const image = (await this.#detailsOf(row)).get("image");
      if (PICTURE.test(image ?? "")) new Image().src = `../${image}`;
    }

    #showPicture(row, seen, details) {
      const known = this.gallery.rows.pictures[row];
      const image = details?.get("image") ?? "";
      const file = PICTURE.test(image) ? `../${image}` : null;
      if (seen.thumb) {
        this.#showFile(file, seen, row);
      } else if (known === HIDDEN) {
        const reveal = () => this.#showFile(file, seen, row);
        this.picture.replaceChildren(
          el("div.words", { data: { status: "flagged" } },
            el("strong", {}, "flagged by the safety checker"),
            el("span", {}, "Its picture was kept. It is not shown unasked."),
            el("button", { type: "button", disabled: !file, onclick: reveal }, "Show it")),
        );
      } else {
        const status = known === UNREADABLE ? "failed" : seen.status;
        this.picture.replaceChildren(el("div.words", { data: { status } }, el("strong", {}, seen.picture), el("span", {}, untrusted(seen.why))));
      }
    }

    // The thumbnail at once, the file when it is there.
    #showFile(file, seen, row) {
      const width = this.gallery.rows.column("width")?.value(row);
      const height = this.gallery.rows.column("height")?.value(row);
      const shown = this.picture.querySelector("img");
      if (!shown || shown.dataset.row !== String(row)) {
        const image = el("img", { alt: seen.title, width, height, data: { row } });
        if (seen.thumb) image.src = seen.thumb;
        this.picture.replaceChildren(image);
      }
      if (!file) return;
      const image = this.picture.querySelector("img");
      const full = new Image();
      full.onload = () => image.isConnected && ((image.src = file), (image.dataset.full = "true"));
      full.onerror = () => {
        if (!image.isConnected) return;
        this.picture.append(el("p.notice", { data: { status: "failed" } }, "The picture's file cannot be read; this is the thumbnail."));
      };
      full.src = file;
    }

    #showFacts(row, seen, details) {
      const { meta, rows } = this.gallery;
      const value = (name) => details?.get(name) ?? rows.column(name)?.value(row) ?? null;
      const texts = new Map(meta.columns.map((column) => [column.name, column.text]));
      const all = [...rows.columns.keys()].filter((name) => name !== "sample");
      const own = all.filter((name) => rows.column(name).varies && !FIRST.includes(name));
      const rest = all.filter((name) => !rows.column(name).varies && !FIRST.includes(name));
      const facts = (names, tag = "dl") => this.#facts(tag, names.filter((name) => value(name) !== null && value(name) !== ""), value, texts);
      const command = `${meta.command} ${rows.sample[row]}`;
      const file = PICTURE.test(value("image") ?? "") ? `../${value("image")}` : null;
      const parts = [
        el("header", {}, el("h2", {}, `Sample ${rows.sample[row]}`), el("span.badge", { data: { status: seen.status } }, seen.status)),
        value("error") ? el("p.notice", { data: { status: "failed" } }, untrusted(value("error"))) : null,
        el("p.prompt", {}, untrusted(value("prompt") ?? "")),
        value("negative_prompt") ? el("p.prompt.negative", {}, el("span.soft", {}, "without "), untrusted(value("negative_prompt"))) : null,
        el("section", {}, el("h3", {}, "Make it again"), seen.status === "failed" ? el("p.soft", {}, "The job's own command with --retry-failed tries failed samples again.") :
          el("div.command", {}, el("code", {}, command.split(" ").flatMap((word, place) => [place ? " " : "", el("span", {}, word)])),
            el("button", { type: "button", onclick: (event) => copy(command, event.currentTarget) }, el("span", {}, "Copy command")))),
        el("div.buttons", {},
          el("button", { type: "button", onclick: (event) => copy(value("prompt") ?? "", event.currentTarget) }, el("span", {}, "Copy prompt")),
          el("button", { type: "button", title: "A line for a manifest of JSON lines", onclick: (event) => copy(request(value), event.currentTarget) }, el("span", {}, "Copy as JSON")),
          file && rows.pictures[row] !== HIDDEN ? el("a.button", { href: file, target: "_blank", rel: "noopener" }, "Open file") : null),
        el("section", {}, el("h3", {}, "Parameters"), facts(FIRST.slice(2).filter((name) => !name.endsWith("prompt")))),
        own.length ? el("section", {}, el("h3", {}, "This sample"), facts(own)) : null,
        details && !value("image") ? null : el("section", {}, el("h3", {}, "Its file"), details ? facts(meta.details, "dl.files") : el("p.soft", {}, "…")),
        el("details", {}, el("summary", {}, "The same for all"), facts(rest)),
      ];
      this.panel.replaceChildren(...parts.filter(Boolean));
    }

    #facts(tag, names, value, texts) {
      const text = (name) => (typeof value(name) === "number" ? latentmill.number(value(name)) : String(value(name)));
      return el(tag, {}, names.flatMap((name) => [el("dt", { title: texts.get(name) ?? "" }, name), el("dd", {}, untrusted(text(name)))]));
    }
  };

  function request(value) {
    const asked = REQUEST.map((name) => [name, value(name)]).filter(([, what]) => what !== null && what !== "");
    return JSON.stringify(Object.fromEntries(asked));
  }
}
