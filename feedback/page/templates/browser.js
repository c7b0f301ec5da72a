"use strict";
// The table of verdicts: only the rows in view exist in the document, so ten thousand scroll like
// ten. All text from the data goes in by textContent.
(function () {
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined && text !== null) node.textContent = text;
    return node;
  };
  const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(0) + "%");

  function browse(root) {
    const data = JSON.parse(root.querySelector("script").textContent);
    const view = root.querySelector(".rows");
    const space = root.querySelector(".space");
    const count = root.querySelector(".count");
    const dialog = root.querySelector("dialog");
    const controls = {
      find: root.querySelector("[name=find]"),
      state: root.querySelector("[name=state]"),
      judge: root.querySelector("[name=judge]"),
      sort: root.querySelector("[name=sort]"),
    };
    const text = (index) => (index === null || index === undefined ? "" : data.texts[index]);
    const haystacks = new Array(data.rows.length);
    const haystack = (index) => {
      if (haystacks[index] === undefined) {
        const row = data.rows[index];
        const parts = [text(row.q), text(row.a), text(row.b), row.id, row.an, row.bn, row.m || ""];
        for (const verdict of row.v) if (verdict) parts.push(text(verdict.r), text(verdict.t), verdict.o);
        haystacks[index] = parts.join("\n").toLowerCase();
      }
      return haystacks[index];
    };
    let shown = [];
    let current = 0;

    const keys = {
      file: null,
      unsure: (row) => (row.p === null ? 2 : Math.abs(row.p - 0.5)),
      swing: (row) => (row.d === null ? 2 : -row.d),
      mass: (row) => (row.ms === null ? 2 : row.ms),
      surest: (row) => (row.p === null ? 2 : -Math.abs(row.p - 0.5)),
    };

    function filter() {
      const words = controls.find.value.toLowerCase().split(/\s+/).filter(Boolean);
      const state = controls.state.value;
      const judge = controls.judge ? controls.judge.value : "";
      shown = [];
      for (let index = 0; index < data.rows.length; index++) {
        const row = data.rows[index];
        if (state && !row.s.includes(state)) continue;
        if (judge && String(row.j) !== judge) continue;
        if (words.length && !words.every((word) => haystack(index).includes(word))) continue;
        shown.push(index);
      }
      const key = keys[controls.sort.value];
      if (key) {
        const values = new Map(shown.map((index) => [index, key(data.rows[index])]));
        shown.sort((left, right) => values.get(left) - values.get(right) || left - right);
      }
      count.textContent =
        shown.length.toLocaleString("en") + " of " + data.rows.length.toLocaleString("en") + " pairs";
      view.scrollTop = 0;
      draw();
    }

    function rowHeight() {
      return parseFloat(getComputedStyle(root).getPropertyValue("--row")) || 48;
    }

    function verdictMark(verdict) {
      if (!verdict) return make("span", "mark none", "not asked");
      if (verdict.o !== "decided" && verdict.o !== "tie") return make("span", "mark bad", verdict.o);
      const kind = verdict.o === "tie" ? "tie" : verdict.w;
      const mark = make("span", "mark " + kind, kind === "tie" ? "tie" : kind.toUpperCase());
      if (verdict.p !== null) mark.append(make("small", "", percent(verdict.p)));
      return mark;
    }

    function draw() {
      const height = rowHeight();
      const top = Math.max(0, Math.floor(view.scrollTop / height) - 6);
      const end = Math.min(shown.length, Math.ceil((view.scrollTop + view.clientHeight) / height) + 6);
      space.style.height = shown.length * height + "px";
      const fragment = document.createDocumentFragment();
      for (let place = top; place < end; place++) {
        const row = data.rows[shown[place]];
        const line = make("button", "row");
        line.type = "button";
        line.style.top = place * height + "px";
        line.dataset.place = place;
        const cell = make("span", "q");
        cell.append(make("bdi", "", text(row.q).slice(-160).replace(/\s+/g, " ")));
        line.append(cell, verdictMark(row.v[0]), verdictMark(row.v[1]));
        const bar = make("span", "p");
        if (row.p !== null) {
          const fill = make("i");
          fill.style.left = 100 * row.p + "%";
          bar.append(fill);
        }
        line.append(bar, make("span", "g", row.g || ""));
        fragment.append(line);
      }
      space.replaceChildren(fragment);
    }

    function side(heading, body, better) {
      const box = make("div", "side" + (better ? " better" : ""));
      const inner = make("div", "text", body);
      inner.dir = "auto";
      box.append(make("div", "side-head", heading), inner);
      return box;
    }

    function verdictBox(title, verdict) {
      const box = make("div", "verdict");
      box.append(make("h4", "", title));
      if (!verdict) {
        box.append(make("p", "", "This order was not asked."));
        return box;
      }
      const facts = [
        ["outcome", verdict.o === "decided" ? verdict.w.toUpperCase() + " preferred" : verdict.o],
        ["P(A preferred)", verdict.p === null ? "–" : verdict.p.toFixed(3)],
        ["verdict mass", verdict.m === null ? "–" : verdict.m.toFixed(3)],
      ];
      const list = make("dl");
      for (const [name, value] of facts) list.append(make("dt", "", name), make("dd", "", value));
      box.append(list);
      for (const index of [verdict.t, verdict.r]) {
        if (text(index)) {
          const reply = make("div", "text reply", text(index));
          reply.dir = "auto";
          box.append(reply);
        }
      }
      box.append(make("code", "", verdict.id));
      return box;
    }

    function open(place) {
      if (place < 0 || place >= shown.length) return;
      current = place;
      const row = data.rows[shown[place]];
      const body = dialog.querySelector(".detail");
      const prompt = make("div", "prompt text", text(row.q));
      prompt.dir = "auto";
      const sides = make("div", "sides");
      sides.append(
        side("A · " + row.an, text(row.a), row.p !== null && row.p > 0.5),
        side("B · " + row.bn, text(row.b), row.p !== null && row.p < 0.5)
      );
      const verdicts = make("div", "sides");
      verdicts.append(verdictBox("A shown first", row.v[0]), verdictBox("B shown first", row.v[1]));
      const line = [data.judges[row.j], row.id];
      if (row.p !== null) line.push("P(A preferred) over both orders " + row.p.toFixed(3));
      if (row.g) line.push("gold: " + row.g.toUpperCase());
      if (row.m) line.push(row.m);
      body.replaceChildren(prompt, sides, verdicts, make("p", "remark", line.join(" · ")));
      dialog.querySelector(".place").textContent = place + 1 + " of " + shown.length;
      if (!dialog.open) dialog.showModal();
      body.scrollTop = 0;
    }

    let waiting = false;
    const later = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        draw();
      });
    };
    view.addEventListener("scroll", later, { passive: true });
    window.addEventListener("resize", later);
    let typing = 0;
    controls.find.addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(filter, 120);
    });
    for (const name of ["state", "judge", "sort"]) {
      if (controls[name]) controls[name].addEventListener("change", filter);
    }
    view.addEventListener("click", (event) => {
      const line = event.target.closest(".row");
      if (line) open(Number(line.dataset.place));
    });
    dialog.querySelector("[name=close]").addEventListener("click", () => dialog.close());
    dialog.querySelector("[name=back]").addEventListener("click", () => open(current - 1));
    dialog.querySelector("[name=next]").addEventListener("click", () => open(current + 1));
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") open(current - 1);
      if (event.key === "ArrowRight") open(current + 1);
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
    filter();
  }

  for (const root of document.querySelectorAll(".browser")) browse(root);
})();
