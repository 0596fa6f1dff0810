// Puts the parts of the page together.

import { watchAccess } from "./access.js";
import { AdapterList, Catalogue } from "./adapters.js";
import { Asking } from "./ask.js";
import { AutoWeights } from "./auto.js";
import { Charts } from "./charts.js";
import { byId, setText } from "./elements.js";
import { Examples } from "./examples.js";
import { Matrix } from "./matrix.js";
import { Mix } from "./mix.js";
import { Mode } from "./mode.js";
import { poll } from "./poll.js";
import { Run } from "./run.js";
import { watchSnippets } from "./snippets.js";
import { Turns } from "./turns.js";
import { Weights } from "./weights.js";

const [catalogue, mix, mode] = [new Catalogue(), new Mix(), new Mode()];
const asking = new Asking(mode, mix, new Turns(mode));
new AdapterList(catalogue, mix);
new Weights(catalogue, mix);
new AutoWeights(catalogue, mix, asking);
new Examples(catalogue, mix, mode);
new Matrix(catalogue, mix);
catalogue.addEventListener("change", () => setText(byId("base-model"), catalogue.baseModel));
watchSnippets(catalogue, asking);

const charts = new Charts();
const askMetrics = poll(() => charts.refresh(), 2);
const askAdapters = poll(() => catalogue.refresh(), 5);
new Run(asking, askAdapters);
watchAccess(() => {
  askAdapters();
  askMetrics();
});
