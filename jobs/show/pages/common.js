// What every page shares: elements, data, copying, the theme. Values reach the page as text only.
"use strict";

const latentmill = (() => {
  const waiting = new Map();

  // The browser holds us to the policy: no text becomes markup, and only files of this page's own data become scripts.
  const policy = window.trustedTypes?.createPolicy("latentmill", {
    createScriptURL(url) {
      if (/^data\/[\w.-]+\.js(\?\d+)?$/.test(url)) return url;
      throw new TypeError(`${url} is no file of data`);
    },
  });

  // Called by the files of data.
  function receive(place, value) {
    waiting.get(place)?.(value);
  }

  // The value in a file of data. `fresh` asks the server again, also where the browser has the file.
  function load(place, { fresh = false } = {}) {
    return new Promise((resolve, reject) => {
      let received = false;
      waiting.set(place, (value) => {
        received = true;
        resolve(value);
      });
      const url = fresh ? `${place}?${Date.now()}` : place;
      const script = document.createElement("script");
      script.src = policy ? policy.createScriptURL(url) : url;
      const done = () => {
        waiting.delete(place);
        script.remove();
        if (!received) reject(new Error(`${place} cannot be read`));
      };
      script.onload = done;
      script.onerror = done;
      document.head.append(script);
    });
  }

  // An element: `on…` properties are listeners, `data` becomes data attributes, `aria` becomes aria attributes,
  // `vars` custom properties of CSS, all else properties of the element or, where it has none, attributes.
  function el(tag, properties = {}, ...children) {
    const [name, ...classes] = tag.split(".");
    const element = document.createElement(name || "div");
    if (classes.length) element.className = classes.join(" ");
    for (const [key, value] of Object.entries(properties)) {
      if (value === undefined || value === null) continue;
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (key === "data") Object.assign(element.dataset, value);
      else if (key === "aria") for (const [part, text] of Object.entries(value)) element.setAttribute(`aria-${part}`, text);
      else if (key === "vars") for (const [part, text] of Object.entries(value)) element.style.setProperty(`--${part}`, text);
      else if (key in element) element[key] = value;
      else element.setAttribute(key, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  }

  // Characters that steer the direction or are no characters at all, made visible; joiners of emoji stay as they are.
  const STEERING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;

  // A stranger's text as nodes: its direction is its own, and characters that steer are shown as what they are.
  function untrusted(text) {
    const nodes = [];
    let from = 0;
    for (const match of text.matchAll(STEERING)) {
      if (match[0] === "\r") continue;
      const code = `U+${match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
      nodes.push(text.slice(from, match.index), el("span.steering", { title: "invisible character" }, code));
      from = match.index + match[0].length;
    }
    nodes.push(text.slice(from));
    return el("bdi", {}, ...nodes);
  }

  // Copies a text, and says so on the button for a moment. Pages from files have no clipboard in some browsers.
  async function copy(text, button) {
    let copied = false;
    try {
      await navigator.clipboard.writeText(text);
      copied = true;
    } catch {
      const area = el("textarea.offscreen", { value: text, readOnly: true });
      (button.closest("dialog") ?? document.body).append(area);
      area.select();
      copied = document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.dataset.said = copied ? "Copied" : "Not copied";
    announce(copied ? "Copied" : "The browser refuses to copy");
    setTimeout(() => delete button.dataset.said, 1600);
  }

  // Tells a screen reader.
  function announce(text) {
    const place = document.getElementById("announcements");
    if (place) place.textContent = text;
  }

  const NUMBER = new Intl.NumberFormat(undefined, { maximumSignificantDigits: 6 });
  const COUNT = new Intl.NumberFormat();

  // A number as people read it. Seeds and other whole numbers have no separators, so that they can be typed again.
  const number = (value) => (Number.isInteger(value) ? String(value) : NUMBER.format(value));
  const count = (value) => COUNT.format(value);
  const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

  // The theme: the system's, until the button says otherwise; remembered where the browser allows it.
  function themeButton(button) {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    let chosen = null;
    try {
      chosen = localStorage.getItem("latentmill-theme");
    } catch {
      // a page from a file may have no memory
    }
    const show = () => {
      const theme = chosen ?? (dark.matches ? "dark" : "light");
      document.documentElement.dataset.theme = theme;
      button.setAttribute("aria-label", theme === "dark" ? "Use light colours" : "Use dark colours");
      button.title = button.getAttribute("aria-label");
    };
    button.addEventListener("click", () => {
      chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      try {
        localStorage.setItem("latentmill-theme", chosen);
      } catch {
        // then it holds for this visit
      }
      show();
    });
    dark.addEventListener("change", show);
    show();
  }

  return { announce, copy, count, el, load, number, plural, receive, themeButton, untrusted };
})();
